"""The report: a page about one run or several, from their folders alone."""
