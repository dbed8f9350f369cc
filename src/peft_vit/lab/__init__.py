"""Studies: methods compared over seeds and data sets, their analysis and their report."""
