# SPDX-License-Identifier: Apache-2.0
"""What a student is trained by: its teacher's distribution, its teacher's hidden states, labels.

`objective` is for `train.loop.fit`, on batches that `taught` gives the teacher's logits: schedules,
checkpoints, accumulation and meshes are the loop's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.core import programs


def divergence(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  weights: Float[Array, "*batch"],
  *,
  temperature: ArrayLike = 1.0,
) -> Float[Array, ""]:
  """Compute the mean of T² KL(teacher || student), in float32.

  Args:
    student: logits.
    teacher: logits.
    weights: one a prediction.
    temperature: T, by which both are divided.

  Returns:
    Nats a prediction, times T².

  Example:
    >>> x = jnp.array([[0.0, 1.0]])
    >>> float(divergence(x, x + 3.0, jnp.ones(1)))
    0.0
  """
  t = jnp.float32(temperature)
  p, q = (jax.nn.log_softmax(x.astype(jnp.float32) / t) for x in (teacher, student))
  each = jnp.sum(jnp.where(jnp.isneginf(p), 0.0, jnp.exp(p) * (p - q)), axis=-1)
  return t**2 * jnp.sum(each * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


def cross_entropy(
  logits: Float[Array, "n classes"], labels: Int[Array, " n"], weights: Float[Array, " n"]
) -> Float[Array, ""]:
  """Compute the mean negative log-likelihood of labels, in float32.

  Args:
    logits: predictions.
    labels: classes.
    weights: one a prediction.

  Returns:
    Nats a prediction.

  Example:
    >>> round(float(cross_entropy(jnp.zeros((1, 4)), jnp.zeros(1, int), jnp.ones(1))), 4)
    1.3863
  """
  logp = jax.nn.log_softmax(logits.astype(jnp.float32))
  picked = jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0]
  return -jnp.sum(picked * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


def difference(spec: Any, params: Any, teacher: Any, x: jax.Array) -> Float[Array, ""]:
  """Compute the mean squared difference of two networks' blocks' outputs.

  Args:
    spec: the architecture of both.
    params: one's parameters.
    teacher: the other's, not differentiated.
    x: what enters them.

  Returns:
    The mean over blocks, places and features, float32.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> p = jax.eval_shape(lambda: models.init(spec, jax.random.key(0)))
    >>> jax.eval_shape(lambda p: difference(spec, p, p, jnp.zeros((1, 3), jnp.int32)), p).shape
    ()
  """

  def outputs(params: Any) -> jax.Array:
    return models.forward(spec, params, x, observe=_outputs).observed["out"]

  return jnp.mean(jnp.square(outputs(params) - jax.lax.stop_gradient(outputs(teacher))))


def objective(*, temperature: float = 1.0, alpha: float = 1.0) -> Callable[..., Any]:
  """Make the loss as `train.loop.fit` takes it.

  Args:
    temperature: T.
    alpha: the teacher's share.

  Returns:
    An objective over batches from `taught`.

  Example:
    >>> callable(objective(temperature=2.0))
    True
  """
  check(temperature=temperature, alpha=alpha)

  def loss(spec: Any, params: Any, batch: Any, keys: Any) -> tuple[jax.Array, dict[str, Any]]:
    del keys
    logits, labels, weights = models.predictions(spec, params, batch)
    teacher = batch["teacher"].reshape(logits.shape)
    soft = divergence(logits, teacher, weights, temperature=temperature)
    hard = cross_entropy(logits, labels, weights)
    total = (1 - alpha) * hard + alpha * soft
    return total, {"weight": weights.sum(), "divergence": soft, "cross_entropy": hard}

  return loss


def taught(teacher: model_lib.Model, data: Iterable[Any]) -> Iterator[dict[str, Any]]:
  """Give batches the teacher's logits.

  Args:
    teacher: the model to learn from.
    data: batches, see `models.losses`.

  Yields:
    The batches as mappings, with "teacher" (batch, places, vocabulary).

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> next(taught(m, [jnp.zeros((2, 3), jnp.int32)]))["teacher"].shape
    (2, 2, 5)
  """
  for batch in data:
    whole = dict(batch) if isinstance(batch, Mapping) else {"tokens": batch}
    rows = len(models.inputs(whole))
    said = _said(teacher.spec, teacher.params, whole)
    shape = (rows, -1) if "tokens" in whole else (rows,)
    yield {**whole, "teacher": said.reshape(*shape, said.shape[-1])}


def check(*, temperature: float, alpha: float, features: float = 0.0) -> None:
  """Refuse strengths that make no loss.

  Args:
    temperature: T.
    alpha: the teacher's share.
    features: weight of the blocks' outputs.

  Raises:
    ValueError: naming the value and what is valid.

  Example:
    >>> check(temperature=2.0, alpha=0.5)
  """
  if temperature <= 0:
    raise ValueError(f"temperature={temperature} must be above 0")
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha={alpha} must lie between 0 and 1")
  if features < 0:
    raise ValueError(f"features={features} must not be negative")


def _outputs(name: str, value: jax.Array) -> jax.Array | None:
  return value.astype(jnp.float32) if name == "out" else None


def _said(spec: Any, params: Any, batch: Any) -> jax.Array:
  return programs.compiled(_predict, (("spec", spec),))(params, {"batch": batch})


def _predict(params: Any, batch: Any, *, spec: Any) -> jax.Array:
  return models.predictions(spec, params, batch)[0]
