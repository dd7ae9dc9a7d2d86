"""From statistics to a plan: what is important, how much of it goes, and what that is."""
