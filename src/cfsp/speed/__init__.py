"""How fast models are, relative to each other and to what their size promises."""
