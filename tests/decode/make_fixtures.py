"""Write fixtures/transformers.npz: results of Hugging Face's generate and logits processors.

    python tests/decode/make_fixtures.py --output=tests/decode/fixtures/transformers.npz

This needs torch and transformers, and nothing of this project. The models are random GPT-2 models.
Note: top_k is 50 unless it is set. A pad id of 0 counts as missing, and ended beams are then padded
with the end token. Only a small vocabulary with a chosen seed has beams that end early, without
which beam search is hardly tested.
"""

import argparse
import json

import numpy as np

VOCABULARY = 13
END = 5
PAD = 1
NEW = 20
CONTEXT = 64
LAYERS = 2
HEADS = 4
WIDTH = 24
# (initializer_range, seed) with many ended beams (0.05) or many different ones (0.2 and 0.3).
MODELS = ((0.05, 31), (0.05, 28), (0.2, 12), (0.2, 13), (0.3, 10))
PROMPTS = (3, 9, 5, 7, 10, 4)  # lengths
BEAMS = (2, 3, 5)
LENGTH_PENALTIES = (0.0, 0.6, 1.0, 2.0, -1.0)
EARLY = (False, True, "never")

# Settings with the same names on both sides, on prompts of one length, because transformers counts
# padding as seen.
GREEDY_SETTINGS = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 0.9},
    {"min_new_tokens": 9},
    {"min_length": 12},
    {"suppress_tokens": [2, 3, 5]},
    {"begin_suppress_tokens": [0, 4, 7, 8]},
    {"forced_eos_token_id": 5},
    {"bad_words_ids": [[2, 4], [7], [3, 3, 3], [9, 9]]},
    {"sequence_bias": [[[2], 0.5], [[3, 4], 2.0], [[6, 6], -3.0], [[8, 8, 8], 1.5]]},
    {"eos_token_id": [5, 7, 9]},
    {
        "sequence_bias": [[[10], 0.7]],
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        "bad_words_ids": [[11]],
        "suppress_tokens": [0],
        "begin_suppress_tokens": [10],
        "forced_eos_token_id": 5,
    },
]
BEAM_SETTINGS = [{"num_beams": 3, "length_penalty": 0.6} | each for each in GREEDY_SETTINGS]

# A processor's class, its arguments, and the equivalent settings here.
PROCESSORS = [
    ("RepetitionPenaltyLogitsProcessor", {"penalty": 1.3}, {"repetition_penalty": 1.3}),
    ("RepetitionPenaltyLogitsProcessor", {"penalty": 0.7}, {"repetition_penalty": 0.7}),
    *(
        ("NoRepeatNGramLogitsProcessor", {"ngram_size": n}, {"no_repeat_ngram_size": n})
        for n in (1, 2, 3)
    ),
    (
        "SequenceBiasLogitsProcessor",
        {"sequence_bias": [[[4], -2.0], [[3, 1], 5.0], [[9, 9, 2], 3.0]]},
        None,
    ),
    (
        "NoBadWordsLogitsProcessor",
        {"bad_words_ids": [[4], [3, 1], [0, 1, 2, 3]], "eos_token_id": 39},
        None,
    ),
    ("SuppressTokensLogitsProcessor", {"suppress_tokens": [1, 7, 30]}, None),
    *(("TopKLogitsWarper", {"top_k": k}, {"top_k": k}) for k in (1, 10, 99)),
    *(("TopPLogitsWarper", {"top_p": p}, {"top_p": p}) for p in (0.1, 0.5, 0.9, 0.99)),
    *(("MinPLogitsWarper", {"min_p": p}, {"min_p": p}) for p in (0.05, 0.5)),
    *(("TypicalLogitsWarper", {"mass": p}, {"typical_p": p}) for p in (0.2, 0.9)),
    *(("EpsilonLogitsWarper", {"epsilon": e}, {"epsilon_cutoff": e}) for e in (0.003, 0.1, 0.9)),
    *(("EtaLogitsWarper", {"epsilon": e}, {"eta_cutoff": e}) for e in (0.003, 0.1, 0.9)),
    ("TemperatureLogitsWarper", {"temperature": 0.7}, {"temperature": 0.7}),
]


def settings_of(entry) -> dict:
    """Return the settings that are equivalent to an entry of PROCESSORS."""
    _, arguments, settings = entry
    return (
        {key: value for key, value in arguments.items() if key != "eos_token_id"}
        if settings is None
        else settings
    )


def logits_and_ids():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 12, (8, 14))
    ids[:, 6:9], ids[:, 12:14] = ids[:, :3], ids[:, :2]  # n-grams that occurred before
    ids[1, -1] = 3
    ids[2, -2:] = (9, 9)
    ids[3, -3:] = (0, 1, 2)
    return rng.normal(0, 3, (8, 40)).astype(np.float32), ids


def prompts(lengths) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [
        [int(t) for t in rng.choice([t for t in range(VOCABULARY) if t != END], length)]
        for length in lengths
    ]


def make() -> dict[str, np.ndarray]:
    import torch
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.generation import logits_process

    def generate(model, tokens, **settings):
        """Return (rows, NEW) new tokens, and the scores of beams."""
        longest = max(map(len, tokens))
        ids, mask = (torch.full((len(tokens), longest), fill) for fill in (PAD, 0))
        for row, prompt in enumerate(tokens):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        beams = settings.get("num_beams", 1)
        done = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            output_scores=True,
            num_return_sequences=beams,
            return_dict_in_generate=True,
            **settings,
        )
        new = done.sequences[:, longest:].numpy()
        scores = done.sequences_scores.numpy() if beams > 1 else np.zeros(len(new), np.float32)
        return np.pad(new, ((0, 0), (0, NEW - new.shape[1])), constant_values=PAD).astype(
            np.int8
        ), scores

    torch.set_num_threads(1)
    made = {
        "versions": np.array(f"torch {torch.__version__}, transformers {transformers.__version__}")
    }
    ragged = prompts(PROMPTS)
    even = prompts((6, 6, 6))
    for number, (spread, seed) in enumerate(MODELS):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(
                n_layer=LAYERS,
                n_head=HEADS,
                n_embd=WIDTH,
                vocab_size=VOCABULARY,
                n_positions=CONTEXT,
                bos_token_id=END,
                eos_token_id=END,
                pad_token_id=PAD,
                attn_pdrop=0,
                resid_pdrop=0,
                embd_pdrop=0,
                initializer_range=spread,
            )
        ).eval()
        for name, tensor in model.state_dict().items():
            if name != "lm_head.weight":  # the embedding
                made[f"{number}/weights/{name.removeprefix('transformer.')}"] = tensor.numpy()
        made[f"{number}/greedy"] = generate(model, ragged)[0]
        for beams in BEAMS:
            found = [
                generate(
                    model, ragged, num_beams=beams, length_penalty=penalty, early_stopping=early
                )
                for penalty in LENGTH_PENALTIES
                for early in EARLY
            ]
            made[f"{number}/beams_{beams}"] = np.stack([tokens for tokens, _ in found])
            made[f"{number}/scores_{beams}"] = np.stack([scores for _, scores in found])
        for name, several in (
            ("greedy_settings", GREEDY_SETTINGS),
            ("beam_settings", BEAM_SETTINGS),
        ):
            found = [generate(model, even, **settings) for settings in several]
            made[f"{number}/{name}"] = np.stack([tokens for tokens, _ in found])
            made[f"{number}/{name}_scores"] = np.stack([scores for _, scores in found])

    logits, ids = map(torch.tensor, logits_and_ids())
    for number, (name, arguments, _) in enumerate(PROCESSORS):
        made[f"processor_{number}"] = getattr(logits_process, name)(**arguments)(
            ids, logits.clone()
        ).numpy()
    # The inputs of the entries: a test that uses others must fail rather than compare them.
    made["settings"] = np.array(json.dumps([GREEDY_SETTINGS, BEAM_SETTINGS, PROCESSORS]))
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True)
    np.savez_compressed(parser.parse_args().output, **make())
