"""What a run is: `schema` holds the dataclasses, `load` reads them, `rules` says what fits
together."""

from mtnlg_jax.config.checks import divisors, near_divisors
from mtnlg_jax.config.load import (
    describe_failure,
    from_json,
    load_config,
    load_object,
    map_paths,
    override,
    split_argument,
    to_json,
)
from mtnlg_jax.config.rules import (
    BEAM_ORDER,
    SAMPLING_LIMITS,
    acting,
    validate,
    validate_batch,
    validate_decode,
    validate_model,
)
from mtnlg_jax.config.schema import (
    PATH,
    Config,
    DataConfig,
    DecodeConfig,
    MaskingConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)
