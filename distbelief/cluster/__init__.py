"""Clusters: the files that describe them, what is wrong with these, and the hosts behind them."""
