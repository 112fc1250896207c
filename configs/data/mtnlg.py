"""The blend of MT-NLG: fifteen sources, each a folder of FOLDER, with the weights of the paper.

    python launch/prepare_data.py --config=configs/data/mtnlg.py --input=FOLDER \\
        --test_sets=EVAL --output=OUT --tokenizer=GPT2_FILES --engine=ray
    python launch/pretrain.py --config=configs/mtnlg_530b.py --set=data.path=OUT --workdir=RUN

The folders are named as in mtnlg_jax/data/mtnlg_blend.py: Books3, OpenWebText2, ... Skip the ones
you lack: --skip_sources=Books3,BookCorpus2; the other weights keep their proportions. Rules for
prose do not run over GitHub, ArXiv and StackExchange, but personal data is masked there as well.

Source: arXiv 2201.11990, table 2, for the weights; section 3.1 for the 270 billion tokens. Chosen
here: of two duplicates the copy in a curated source is kept rather than the one in a crawl.
"""

from mtnlg_jax.data.filter.clean import CleanConfig
from mtnlg_jax.data.mtnlg_blend import CRAWLS, TECHNICAL, WEIGHTS
from mtnlg_jax.data.recipe.settings import TECHNICAL_TEXT, Recipe, Source


def get_config() -> Recipe:
    sources = tuple(
        Source(
            name,
            (name,),
            weight,
            priority=-1 if name in CRAWLS else 0,
            **(TECHNICAL_TEXT if name in TECHNICAL else {}),
        )
        for name, weight in WEIGHTS.items()
    )
    return Recipe(
        name="mtnlg",
        sources=sources,
        clean=CleanConfig(languages=("en",)),
        train_tokens=270_000_000_000,
    )
