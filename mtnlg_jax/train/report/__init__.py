"""report.html of a run: one page that is readable without a network and without scripts."""
