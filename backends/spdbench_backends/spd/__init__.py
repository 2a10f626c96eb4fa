"""SPD, speculative pipeline decoding (arXiv 2605.30852): the schedule's backend, its draft module and its formats."""
