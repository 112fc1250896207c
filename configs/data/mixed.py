"""English and Chinese with half of the samples each, whatever their sizes: FOLDER holds the folders
en and zh.

    python launch/prepare_data.py --config=configs/data/mixed.py --input=FOLDER \\
        --test_sets=EVAL --output=OUT
    python launch/pretrain.py --config=configs/small.py --set=data.path=OUT --workdir=RUN

Source: chosen here.
"""

from mtnlg_jax.data.filter.clean import CleanConfig
from mtnlg_jax.data.filter.decontaminate import Decontamination
from mtnlg_jax.data.recipe.settings import DecontaminationConfig, Recipe, Source


def get_config() -> Recipe:
    return Recipe(
        name="mixed",
        sources=(
            Source("en", ("en",), weight=0.5),
            Source("zh", ("zh",), weight=0.5, text_key="text|content|paragraphs"),
        ),
        clean=CleanConfig(languages=("en", "zh")),
        decontamination=DecontaminationConfig(algorithm=Decontamination(words="characters")),
    )
