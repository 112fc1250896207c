"""Chinese text by the same recipe, with characters in place of words, also in the n-grams of test
sets.

    python launch/prepare_data.py --config=configs/data/chinese.py --input=FOLDER \\
        --test_sets=EVAL --output=OUT
    python launch/pretrain.py --config=configs/small.py --set=data.path=OUT --workdir=RUN

Source: chosen here; the paper's text is English.
"""

from mtnlg_jax.data.filter.clean import CleanConfig
from mtnlg_jax.data.filter.decontaminate import Decontamination
from mtnlg_jax.data.filter.quality import ClassifierConfig
from mtnlg_jax.data.recipe.settings import DecontaminationConfig, QualityConfig, Recipe


def get_config() -> Recipe:
    return Recipe(
        name="chinese",
        text_key="text|content|paragraphs",
        clean=CleanConfig(languages=("zh",)),
        decontamination=DecontaminationConfig(
            algorithm=Decontamination(26, 16, words="characters")
        ),
        quality=QualityConfig(classifier=ClassifierConfig(units="characters")),
    )
