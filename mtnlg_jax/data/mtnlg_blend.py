"""The fifteen sources of MT-NLG and their shares of the training samples.

Source: Smith et al. 2022, arXiv 2201.11990, table 2. `configs/data/mtnlg.py` prepares them and
`configs/mtnlg_530b.py` trains on them under the same names.
"""

WEIGHTS = {
    "Books3": 0.14336,
    "OpenWebText2": 0.19336,
    "StackExchange": 0.05689,
    "PubMedAbstracts": 0.02897,
    "Wikipedia": 0.04771,
    "Gutenberg": 0.00873,
    "BookCorpus2": 0.01007,
    "NIHExPorter": 0.00208,
    "Pile-CC": 0.09446,
    "CC-2020-50": 0.13017,
    "CC-2021-04": 0.15652,
    "RealNews": 0.08962,
    "CC-Stories": 0.00859,
    "ArXiv": 0.01359,
    "GitHub": 0.01588,
}

# Web crawls have the lower priority: of two duplicates the copy in a curated source is kept.
CRAWLS = ("Pile-CC", "CC-2020-50", "CC-2021-04", "CC-Stories")

# Code and mathematics, where rules for prose would drop or change most documents.
TECHNICAL = ("StackExchange", "ArXiv", "GitHub")
