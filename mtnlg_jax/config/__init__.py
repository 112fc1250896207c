"""The config of a run. `schema` holds the dataclasses, `load` reads them, `rules` and
`decode_rules` check what must fit together."""

from mtnlg_jax.config.checks import divisors, near_divisors
from mtnlg_jax.config.decode_rules import BEAM_ORDER, SAMPLING_LIMITS, acting, validate_decode
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
from mtnlg_jax.config.model import (
    LayerSpec,
    ModelConfig,
    MoEConfig,
    Multipliers,
    PrefixConfig,
    RopeScaling,
)
from mtnlg_jax.config.rules import validate, validate_batch, validate_model
from mtnlg_jax.config.schema import (
    LONGEST_SPIKE_WINDOW,
    PATH,
    Config,
    DataConfig,
    DecodeConfig,
    MaskingConfig,
    MeshConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)
