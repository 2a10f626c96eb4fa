"""From recorded results to devices that are not there: a simulated pipeline of n devices, and its opponents."""
