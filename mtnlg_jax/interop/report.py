"""The lines that `huggingface.convert` reports to the user."""

from mtnlg_jax.config import DecodeConfig, ModelConfig
from mtnlg_jax.interop.source import changed_decoding


def of_model(model: ModelConfig, tokenizer, numbers: str | None = None) -> list[str]:
    """Return the lines on a model's shape, its numbers and its vocabulary."""
    rest = model.vocabulary - tokenizer.vocab_size
    padding = f"; {rest} more rows are kept but never written" if rest > 0 else ""
    head = "tied" if model.tie_embeddings else "separate"
    return [
        f"model      {model.parameter_count():,} parameters, {model.num_layers} layers of width "
        f"{model.hidden_size}, {model.num_attention_heads} heads, output embedding {head}",
        *([f"numbers    {numbers}"] if numbers else []),
        f"vocabulary {model.vocab_size:,} rows for {tokenizer.vocab_size:,} tokens{padding}",
    ]


def of_tokenizer(tokenizer, outside: list[str], rows: int) -> list[str]:
    """Return the lines on how prompts begin and end, and on what the tokenizer loses."""

    def spelled(index: int) -> str:
        name = tokenizer.special_names.get(index) or repr(tokenizer.decode([index]))
        return f"{name} ({index})"

    bos = "begin with bos" if tokenizer.prompt_bos else "get no bos, as there"
    end = (
        f"the end token is {spelled(tokenizer.eos_id)}"
        if tokenizer.eos_id >= 0
        else f"there is no end token; an empty prompt starts from {spelled(tokenizer.bos_id)}"
    )
    lines = [f"prompts    {bos}; {end}"]
    if outside:
        more = " ..." if len(outside) > 6 else ""
        lines.append(
            f"left out   {', '.join(outside[:6])}{more}: special tokens without a row "
            f"among the model's {rows:,}; no text has them"
        )
    if losses := tokenizer.losses():
        lines.append(f"lossy      this tokenizer is not lossless; a text loses {', '.join(losses)}")
    return lines


def of_decode(decode: DecodeConfig, not_kept: list[str]) -> list[str]:
    """Return the lines on generation_config.json: what a run takes over, and what it does not."""
    changed = [f"{name}={value}" for name, value in changed_decoding(decode).items()]
    lines = []
    if changed:
        lines.append(f"decoding   as generation_config.json has it: {', '.join(changed)}")
    if not_kept:
        lines.append(f"not kept   of generation_config.json: {', '.join(not_kept)}")
    return lines


def kinds(dtypes: dict[str, str]) -> str:
    """Return the types of tensors, such as "BF16 and F32"."""
    return " and ".join(sorted(set(dtypes.values())))


def first(names: list[str]) -> str:
    """Return up to three names, and how many more there are."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
