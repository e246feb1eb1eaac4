"""Equal-budget comparison of the loop with its rivals: arms, budgets, runs, statistics, the page."""
