"""The report: one self-contained page that shows what pruning did, for one run or several."""
