"""English text by the recipe of MT-NLG: cleaned, without duplicates or test sets.

    python launch/prepare_data.py --config=configs/data/english.py --input=FOLDER \\
        --test_sets=EVAL --output=OUT
    python launch/pretrain.py --config=configs/small.py --set=data.path=OUT --workdir=RUN

Each folder of FOLDER becomes a source, weighted by its tokens. Sources: arXiv 2201.11990 and its
team's scripts (tools/openwebtext of Megatron-LM) for minimum length, shingles, hashes, bands and
n-grams; the other limits are documented where they are defined (mtnlg_jax/data/filter/clean.py).
"""

from mtnlg_jax.data.filter.clean import CleanConfig
from mtnlg_jax.data.recipe.settings import Recipe


def get_config() -> Recipe:
    return Recipe(name="english", clean=CleanConfig(languages=("en",)))
