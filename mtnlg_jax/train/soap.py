"""SOAP (Vyas 2024, arXiv 2409.11321): Adam in the eigenbases of Shampoo's statistics.

A matrix G of inputs x outputs has the statistics G G' and G' G. Their eigenvectors turn the
gradient into a basis in which Adam's second moments live. Each layer and each expert has a matrix
of its own. Two things differ from the paper's algorithms 3 and 4, so that every mesh gives the same
numbers:

- Bases begin as the identity and turn after every ``frequency`` steps. The steps before the first
  turn are Adam's. The paper takes all eigenvectors of the first gradient and skips its update. Most
  of them belong to the eigenvalue 0 of a matrix of low rank, so rounding would choose them.
- The power iteration is shifted by _SHIFT of the largest eigenvalue, which has the same
  eigenvectors. Without it, rounding turns directions whose eigenvalues it drowns.

Columns are sorted by their eigenvalues before each turn, as in the authors' code.
"""

# Shapes: L layers, E experts, M inputs of a matrix, N outputs, J columns of a statistic or basis;
# in names of parameters the letters of `parallel.mesh`

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.parallel.mesh import AXIS_OF, axes_in, dims_of, parameter_name

Path = tuple[Any, ...]  # of a leaf, as jax.tree_util gives it
Key = tuple[str, ...]
Arrays = dict[Key, jax.Array]
MatrixDims = Callable[[Path], tuple[tuple[int, ...], tuple[int, ...]]]

# Eigenvalues below this share of the largest turn slowly. float32 rounds at 1e-7 of the largest, so
# bases on two meshes agree to about 1e-3.
_SHIFT = 1e-4


class SoapState(NamedTuple):
    """Zeros at first. Names of statistics and bases end in their dims, such as w_q_DJ and w_q_NHU
    of w_q_DNH, by which the plan of the mesh splits them."""

    steps: jax.Array  # int32; those done
    mu: Any  # means of the gradients
    nu: Any  # means of the squares of the turned gradients, by eigenvector
    statistics: dict[str, Any]  # (L, side, side), or (L, E, side, side)
    bases: dict[str, Any]  # the same shapes; before the first turn the identity


class _Side(NamedTuple):
    """The inputs or the outputs of a matrix."""

    key: Key  # of its statistic
    rows: tuple[str, ...]  # axes of the mesh that split them
    columns: tuple[str, ...]
    shape: tuple[int, ...]  # of its statistic in the state
    size: int


class _Matrix:
    """The stacked matrices of one parameter."""

    def __init__(self, path: Path, shape: tuple[int, ...], max_dim: int, dims: MatrixDims) -> None:
        self._shape = shape
        inputs, _ = dims(path)
        self.lead = shape[: inputs[0]]
        keys = tuple(key.key for key in path if isinstance(getattr(key, "key", None), str))
        stem = parameter_name(path).rpartition("_")[0]
        # L is known from the path, E belongs to the name.
        experts = dims_of(path)[1 : inputs[0]]
        self.sizes: list[int] = []
        self.sides: list[_Side | None] = []  # None: too long, so not turned
        for part in dims(path):
            letters = "".join(dims_of(path)[dim] for dim in part)
            whole = tuple(shape[dim] for dim in part)
            size = math.prod(whole)
            # ZeRO splits the rows of D, and the columns where the rows are split over tensor.
            columns = "U" if letters[0] in "FNK" else "J"
            name = f"{stem}_{experts}{letters}{columns}"
            shape_of_side = (*self.lead, *whole, size)
            rows = axes_in(AXIS_OF.get(letters[0]))
            of_columns = axes_in(AXIS_OF.get(columns))
            side = _Side((*keys[:-1], name), rows, of_columns, shape_of_side, size)
            self.sizes.append(size)
            self.sides.append(side if size <= max_dim else None)

    def turned_sides(self) -> Iterable[tuple[int, _Side]]:
        """Return (0 for inputs or 1 for outputs, the side)."""
        return ((number, side) for number, side in enumerate(self.sides) if side)

    def two_dims(self, array: jax.Array) -> jax.Array:
        """Return the parameter's array as (..., M, N)."""
        return array.reshape(*self.lead, *self.sizes)

    def own_dims(self, array_MN: jax.Array) -> jax.Array:
        return array_MN.reshape(self._shape)

    def square(self, arrays: Arrays, side: _Side) -> jax.Array:
        """Return the statistic or basis of ``side`` as (..., side, J)."""
        return arrays[side.key].reshape(*self.lead, side.size, side.size)

    def turn(self, array_MN: jax.Array, bases: Arrays, back: bool = False) -> jax.Array:
        """Return the array in the coordinates of the eigenvectors, or ``back`` from them."""
        for number, side in self.turned_sides():
            basis = self.square(bases, side)
            basis = basis if back else jnp.swapaxes(basis, -1, -2)
            if number == 0:
                array_MN = _product(basis, array_MN)
            else:
                array_MN = _product(array_MN, jnp.swapaxes(basis, -1, -2))
        return array_MN


# Accelerators would otherwise round the factors of a product to bfloat16.
_product = functools.partial(jnp.matmul, precision="highest")


def scale_by_soap(
    b1: float,
    b2: float,
    eps: float,
    frequency: int,
    max_dim: int,
    dims: MatrixDims,
    mesh: Mesh | None = None,
    before: Callable[[Path], float] = lambda path: 1.0,
) -> optax.GradientTransformation:
    """Return SOAP for trees of stacked matrices; the caller scales by the learning rate.

    Args:
      b1, b2: decays of the first moment, and of second moments and statistics.
      frequency: steps from one turn of the bases to the next.
      max_dim: sides longer than this keep the identity as their basis.
      dims: path -> (input dims, output dims) of a parameter; those before them are stacked.
      mesh: its devices share the turns; None: one device.
      before: path -> factor of the updates before the first turn, which are Adam's; a matrix
        without a turned side has none.
    """

    def matrices(tree: Any) -> list[_Matrix]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return [_Matrix(path, leaf.shape, max_dim, dims) for path, leaf in leaves]

    def init(params: Any) -> SoapState:
        shapes = {
            side.key: side.shape for each in matrices(params) for _, side in each.turned_sides()
        }
        zeros = {key: jnp.zeros(shape, jnp.float32) for key, shape in shapes.items()}
        moments = jax.tree.map(jnp.zeros_like, params)
        statistics = unflatten_dict(zeros)
        return SoapState(jnp.int32(0), moments, moments, statistics, statistics)

    def update(grads: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        each = matrices(grads)
        factors = [before(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
        steps = state.steps + 1
        statistics = flatten_dict(state.statistics)
        bases = flatten_dict(state.bases)
        for matrix in each:
            for _, side in matrix.turned_sides():
                eye = jnp.eye(side.size).reshape(side.shape[len(matrix.lead) :])
                bases[side.key] = jnp.where(state.steps == 0, eye, bases[side.key])
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        means = [m.two_dims(x) for m, x in zip(each, jax.tree.leaves(mu), strict=True)]
        grads_MN = [m.two_dims(x) for m, x in zip(each, jax.tree.leaves(grads), strict=True)]
        squares = [m.two_dims(x) for m, x in zip(each, jax.tree.leaves(state.nu), strict=True)]
        updates = []
        for number, matrix in enumerate(each):
            turned_MN = matrix.turn(grads_MN[number], bases)
            square_MN = b2 * squares[number] + (1 - b2) * turned_MN**2
            squares[number] = square_MN
            root_MN = jnp.sqrt(square_MN / (1 - b2**steps)) + eps
            mean_MN = matrix.turn(means[number] / (1 - b1**steps), bases)
            update_MN = matrix.turn(mean_MN / root_MN, bases, back=True)
            if factors[number] != 1 and any(matrix.sides):
                update_MN *= jnp.where(state.steps < frequency, factors[number], 1.0)
            updates.append(update_MN)
        # After the update, so that a gradient never chooses the basis in which it is measured.
        for matrix, grad_MN in zip(each, grads_MN, strict=True):
            for number, side in matrix.turned_sides():
                grad = grad_MN if number == 0 else jnp.swapaxes(grad_MN, -1, -2)
                now = _product(grad, jnp.swapaxes(grad, -1, -2)).reshape(side.shape)
                statistics[side.key] = b2 * statistics[side.key] + (1 - b2) * now
        bases, squares = jax.lax.cond(
            steps % frequency == 0,
            functools.partial(_turn_all, each, mesh, statistics),
            lambda bases, squares: (bases, squares),
            bases,
            squares,
        )
        structure = jax.tree.structure(grads)
        nu = [matrix.own_dims(square) for matrix, square in zip(each, squares, strict=True)]
        new = [matrix.own_dims(update) for matrix, update in zip(each, updates, strict=True)]
        state = SoapState(
            steps,
            mu,
            jax.tree.unflatten(structure, nu),
            unflatten_dict(statistics),
            unflatten_dict(bases),
        )
        return jax.tree.unflatten(structure, new), state

    return optax.GradientTransformation(init, update)


def _turn_all(
    matrices: list[_Matrix],
    mesh: Mesh | None,
    statistics: Arrays,
    bases: Arrays,
    squares: list[jax.Array],
) -> tuple[Arrays, list[jax.Array]]:
    """Return bases one power iteration closer to the eigenvectors of the statistics, and the second
    moments (..., M, N) in the order of their columns."""
    bases = dict(bases)
    squares = list(squares)
    for place, matrix in enumerate(matrices):
        for number, side in matrix.turned_sides():
            basis, order_J = _shared(
                mesh, side, matrix.square(statistics, side), matrix.square(bases, side)
            )
            bases[side.key] = basis.reshape(side.shape)
            along = order_J[..., :, None] if number == 0 else order_J[..., None, :]
            squares[place] = jnp.take_along_axis(squares[place], along, axis=number - 2)
    return bases, squares


def _shared(
    mesh: Mesh | None, side: _Side, statistic: jax.Array, basis: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return `_closer`, of which each device of ``mesh`` computes its share of the matrices."""
    if mesh is None or mesh.size == 1:
        return _closer(statistic, basis)
    # XLA would factorize every matrix on every device. Layers stay on their stage and experts on
    # their devices. All other axes split the layers of a stage: those that split columns, then
    # those of the rows, one at a time, since XLA moves no two at once.
    layers, *experts = statistic.shape[:-2]
    kept = ["expert" for _ in experts]
    columns, rows = (
        tuple(axis for axis in axes if axis not in kept) for axes in (side.columns, side.rows)
    )
    others = (a for a in mesh.axis_names if a not in ("pipe", *kept, *columns, *rows))
    axes = (*columns, *rows, *others)
    stages = mesh.shape["pipe"]
    padding = -(layers // stages) % math.prod(mesh.shape[axis] for axis in axes)
    split = P("pipe", axes, *kept)
    layouts = (
        P("pipe", None, *kept, rows, columns),
        P("pipe", columns, *kept, rows, None),
        P("pipe", (*columns, *rows), *kept, None, None),
    )

    def staged(array: jax.Array) -> jax.Array:
        array = _on(mesh, layouts[0], array.reshape(stages, layers // stages, *array.shape[1:]))
        # Whole layers are added before any layer moves.
        array = jnp.pad(array, [(0, 0), (0, padding), *[(0, 0)] * (array.ndim - 2)])
        return functools.reduce(lambda array, spec: _on(mesh, spec, array), layouts, array)

    new, order_J = jax.shard_map(
        _closer, mesh=mesh, in_specs=(split, split), out_specs=(split, split)
    )(staged(statistic), staged(basis))
    new = functools.reduce(lambda array, spec: _on(mesh, spec, array), layouts[::-1], new)
    new = _on(mesh, layouts[0], new[:, : layers // stages])
    # Small, and every device needs it.
    order_J = _on(mesh, P("pipe", None, *kept), order_J)[:, : layers // stages]
    return new.reshape(basis.shape), order_J.reshape(basis.shape[:-1])


def _on(mesh: Mesh, spec: P, array: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def _closer(statistic: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (a basis closer to the eigenvectors of ``statistic``, the order of its columns in
    ``basis``) by one power iteration and a QR factorization; both are (..., side, side)."""
    powered = _product(statistic, basis)
    values_J = jnp.sum(basis * powered, axis=-2)  # estimates of the eigenvalues
    order_J = jnp.argsort(-values_J, axis=-1)
    largest = jnp.max(values_J, axis=-1)[..., None, None]
    # Of size 1, and the old basis where all gradients were 0.
    shifted = powered / jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) + _SHIFT * basis
    return jnp.linalg.qr(jnp.take_along_axis(shifted, order_J[..., None, :], axis=-1))[0], order_J
