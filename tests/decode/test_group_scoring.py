"""Compare groups of continuations with rows that hold one continuation each."""

import jax
import numpy as np
import pytest

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.decode import forest, group_scoring
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.group_scoring import score_groups
from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.parallel.mesh import make_mesh

CLOSE = 3e-5
PADDING = 17  # ids of the models behind those of the tokenizer


def draw_groups(tiny, seed=0):
    """Return groups whose contexts and continuations share beginnings of several lengths."""
    draws = np.random.default_rng(seed)

    def tokens(number):
        return draws.integers(0, tiny.config.vocabulary - PADDING, number).tolist()

    shared = tokens(20)
    groups = []
    for _ in range(7):
        context = shared[: draws.integers(1, 20)] + tokens(draws.integers(1, 12))
        stem = tokens(draws.integers(0, 6))
        many = [stem + tokens(draws.integers(1, 8)) for _ in range(draws.integers(1, 5))]
        groups.append((context, many))
    # Many of one token; equal ones, one inside another, none; the longest.
    groups.append((shared, [[each] for each in range(9)]))
    groups.append((shared[:7], [[3, 4], [3, 4], [3], [3, 4, 5], []]))
    groups.append((tokens(tiny.decoder.context - 8), [tokens(8), tokens(2)]))
    # Of one token; with a continuation that spells another context, and the same row cut elsewhere.
    groups.append((shared[:1], [shared[1:7], shared[1:9], shared[:1]]))
    groups.append((shared[:8], [shared[8:9]]))
    return groups


def expected(decoder, groups):
    rows = [[*context, *each] for context, many in groups for each in many]
    return score_rows(decoder, rows, [len(context) for context, many in groups for _ in many])


def flat(scored):
    return [each for many in scored for each in many]


def differences(found, want):
    pairs = zip(found, want, strict=True)
    return max(np.abs(each.logprobs - row).max(initial=0) for each, row in pairs)


@pytest.mark.parametrize("name", ["learned", "rotary", "windowed", "biased", "balanced"])
def test_every_continuation_scores_as_in_a_row_of_its_own(request, name):
    tiny = request.getfixturevalue(name)
    groups = draw_groups(tiny)
    found = score_groups(tiny.decoder, groups)
    assert differences(flat(found), expected(tiny.decoder, groups)) < CLOSE
    for (_, many), scored in zip(groups, found, strict=True):
        assert [len(each.best) for each in scored] == list(map(len, many))


def test_the_best_token_is_told_and_the_last_token_is_not_read(learned):
    """Context and continuation have one token more than the model has positions."""
    draws = np.random.default_rng(1)
    row = draws.integers(0, 200, learned.decoder.context).tolist()
    logits = learned.logits([row])[0]
    best = logits.argmax(-1)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    worst = int(logits[-1].argmin())
    endings = [[*row[-2:], int(best[-1])], [*row[-2:], worst]]
    (first, second), (third,) = score_groups(
        learned.decoder, [(row[:-2], endings), (row[:5], [[int(best[4])]])]
    )
    assert [first.best[-1], second.best[-1], third.best[-1]] == [True, False, True]
    assert first.best[:2].tolist() == [best[-3] == row[-2], best[-2] == row[-1]]
    np.testing.assert_allclose(first.logprobs[-1], logprobs[-1, best[-1]], atol=CLOSE)
    np.testing.assert_allclose(second.logprobs[-1], logprobs[-1, worst], atol=CLOSE)
    np.testing.assert_allclose(third.logprobs[0], logprobs[4, best[4]], atol=CLOSE)


@pytest.mark.parametrize("name", ["rotary", "windowed"])
def test_a_mask_without_expiry_would_score_otherwise(request, name, monkeypatch):
    """Otherwise the comparisons above would prove nothing."""
    tiny = request.getfixturevalue(name)
    groups = draw_groups(tiny)
    real = forest._block

    def seeing_everything(rows, number, width, branches):
        block = real(rows, number, width, branches)
        return block._replace(ends_BS=np.full_like(block.ends_BS, width))

    monkeypatch.setattr(forest, "_block", seeing_everything)
    found = flat(score_groups(tiny.decoder, groups))
    assert differences(found, expected(tiny.decoder, groups)) > 0.1


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("rotary", {"data": 2, "tensor": 2, "context": 2}),
        ("balanced", {"data": 2, "tensor": 2, "expert": 2}),
        ("striped", {"pipe": 2, "data": 2, "tensor": 2}),
        ("biased", {"pipe": 2, "tensor": 2}),
        ("windowed", {"context": 3}),
    ],
)
def test_groups_over_a_mesh_score_as_on_one_device(request, name, sizes):
    tiny = request.getfixturevalue(name)
    groups = draw_groups(tiny)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = make_mesh(MeshConfig(**{"data": 1} | sizes), devices)
    over = unstack(tiny.config, tiny.params, mesh=mesh)
    one = flat(score_groups(tiny.decoder, groups))
    found = flat(score_groups(over, groups))
    assert differences(found, [each.logprobs for each in one]) < CLOSE
    assert all((a.best == b.best).all() for a, b in zip(found, one, strict=True))


def test_int8_weights_score_as_their_rows_do(rotary):
    decoder = unstack(rotary.config, rotary.params, weights="int8")
    groups = draw_groups(rotary)
    found = flat(score_groups(decoder, groups))
    assert differences(found, expected(decoder, groups)) < 1e-3
    assert differences(found, expected(rotary.decoder, groups)) > 1e-3


def test_a_single_group_scores_as_its_rows_do(rotary):
    """Its block has fewer places than a part of the head, or not a multiple of it."""
    groups = draw_groups(rotary)
    for group in (groups[0], *groups[-3:]):
        found = flat(score_groups(rotary.decoder._replace(block_tokens=16), [group]))
        many = [each for each in group[1] if each]
        want = expected(rotary.decoder, [(group[0], many)])
        assert differences([each for each in found if each.logprobs.size], want) < CLOSE


def test_few_programs_serve_many_groups_and_little_is_padding(learned, monkeypatch):
    shapes = set()
    read = []
    real = group_scoring._score

    def counted(params, tokens_BS, *arrays, **options):
        shapes.add((tokens_BS.shape, options["branches"]))
        read.append(tokens_BS.size)
        return real(params, tokens_BS, *arrays, **options)

    monkeypatch.setattr(group_scoring, "_score", counted)
    groups = [group for seed in range(60) for group in draw_groups(learned, seed)]
    trees = forest.trees_of(*group_scoring._rows_of(learned.decoder, groups)[:2])
    calls = []
    score_groups(learned.decoder._replace(block_tokens=1024), groups, calls.append)
    assert len(shapes) <= 2
    assert sum(calls) == sum(len(each) > 0 for _, many in groups for each in many)
    nodes = sum(len(tree.tokens_S) for tree in trees)
    apart = sum(len(context) + len(each) - 1 for context, many in groups for each in many)
    assert nodes < 0.5 * apart
    # All but the last block are full.
    assert sum(read) - 1024 < 1.05 * nodes


def test_a_long_beginning_is_read_once_for_many_sequences():
    draws = np.random.default_rng(0)
    beginning = draws.integers(0, 99, 300).tolist()
    rows = [[*beginning, *draws.integers(0, 99, 12).tolist()] for _ in range(20)]
    (tree,) = forest.trees_of(rows, [300] * 20)
    assert len(tree.tokens_S) <= 300 + 20 * 11
    assert sorted(tree.sequences) == list(range(20))
    assert tree.branches
    assert not forest.trees_of(rows[:1], [300])[0].branches


def test_a_tree_is_laid_out_depth_first():
    """The drawing at the head of forest.py."""
    rows = [(1, 2, 3, 4, 9), (1, 2, 3, 5, 9), (1, 2, 6, 9)]
    (tree,) = forest.trees_of(rows, [4, 4, 3])
    assert tree.tokens_S.tolist() == [1, 2, 3, 4, 5, 6]
    assert tree.positions_S.tolist() == [0, 1, 2, 3, 3, 2]
    assert tree.ends_S.tolist() == [6, 6, 5, 4, 5, 6]
    assert tree.at_W.tolist() == [3, 4, 5]


def test_bad_groups_are_refused(learned, tokenizer):
    decoder = learned.decoder
    with pytest.raises(ValueError, match="context of group 1 is empty"):
        score_groups(decoder, [([1], [[2]]), ([], [[2]])])
    with pytest.raises(ValueError, match=r"60 tokens and its continuation 0 has 6.*reads 64"):
        score_groups(decoder, [([1] * 60, [[2] * 6])])
    with pytest.raises(ValueError, match=r"token 999 is outside .*0 to"):
        score_groups(decoder, [([1], [[999]])])
    assert score_groups(decoder, []) == []
    assert [each.logprobs.size for each in score_groups(decoder, [([1], [[]])])[0]] == [0]


def test_long_rows_are_read_in_parts(windowed, biased, monkeypatch):
    """Queries see keys of earlier parts, as distances of positions say."""
    monkeypatch.setattr(group_scoring, "QUERIES", 16)
    monkeypatch.setattr(group_scoring, "PARTS", 3)
    for tiny in (windowed, biased):
        # A mark of its own, so that the program is compiled again.
        decoder = tiny.decoder._replace(block_tokens=128)
        monkeypatch.setattr(
            group_scoring,
            "_score",
            jax.jit(group_scoring._score.__wrapped__, static_argnames=("config", "branches")),
        )
        groups = draw_groups(tiny, 5)[:4]
        assert differences(flat(score_groups(decoder, groups)), expected(decoder, groups)) < CLOSE
