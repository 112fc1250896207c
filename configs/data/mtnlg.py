"""The blend of MT-NLG: fifteen sources, each a folder of FOLDER of the name below, with the weights of the paper.

python launch/prepare_data.py --config=configs/data/mtnlg.py --input=FOLDER --test_sets=EVAL --output=OUT \\
    --tokenizer=GPT2_FILES --engine=ray
python launch/pretrain.py --config=configs/mtnlg_530b.py --set=data.path=OUT --workdir=RUN

Source: arXiv 2201.11990, table 2, for the weights; section 3.1 for the 270 billion tokens that they are told for. Of
duplicates a copy in a curated source stays rather than one in a crawl, which is chosen here. What you lack, leave out
with --skip_sources=Books3,BookCorpus2: the other weights keep their proportions.
"""

from mtnlg_jax.data.clean import CleanConfig
from mtnlg_jax.data.recipe.settings import Recipe, Source

_BLEND = {
    "Books3": 0.14336, "OpenWebText2": 0.19336, "StackExchange": 0.05689, "PubMedAbstracts": 0.02897,
    "Wikipedia": 0.04771, "Gutenberg": 0.00873, "BookCorpus2": 0.01007, "NIHExPorter": 0.00208, "Pile-CC": 0.09446,
    "CC-2020-50": 0.13017, "CC-2021-04": 0.15652, "RealNews": 0.08962, "CC-Stories": 0.00859, "ArXiv": 0.01359,
    "GitHub": 0.01588,
}
_CRAWLS = ("Pile-CC", "CC-2020-50", "CC-2021-04", "CC-Stories")


def get_config() -> Recipe:
    sources = tuple(Source(name, (name,), weight, priority=-1 if name in _CRAWLS else 0)
                    for name, weight in _BLEND.items())
    return Recipe(name="mtnlg", sources=sources, clean=CleanConfig(languages=("en",)), train_tokens=270_000_000_000)
