# SPDX-License-Identifier: Apache-2.0
"""From a name to its factory, and from a spelling to its transform."""

import ast
import difflib
import importlib
from collections.abc import Callable
from typing import Any

from treesurgeon.core import step
from treesurgeon.registry import recipes, table


def parse(expression: str) -> step.Transform:
  """Read a transform from its canonical spelling; names and literals only.

  Args:
    expression: like `compress.prune.wanda(sparsity=0.5) + compress.quantize.gptq(bits=4)`;
      `by_path([(regex, transform), ...])` and `chain(a, b)` may nest; a recipe's name stands for
      its chain.

  Returns:
    The transform.

  Raises:
    ValueError: for a syntax error, unknown name or argument, or an argument that is no literal.

  Example:
    >>> parse("compress.quantize.rtn(bits=4) + compress.quantize.rtn(bits=3)")
    (compress.quantize.rtn(), compress.quantize.rtn(bits=3))
  """
  try:
    tree = ast.parse(expression.strip(), mode="eval")
  except SyntaxError as error:
    raise ValueError(f"cannot read the transform {expression!r}: {error.msg}") from error
  except (ValueError, MemoryError, RecursionError) as error:  # null bytes; too deep
    raise ValueError(f"cannot read the transform {expression[:80]!r}: {error}") from error
  return _build(tree.body, expression)


def load(name: str) -> Callable[..., step.Transform]:
  """Import a method's factory.

  Args:
    name: a name in the table.

  Returns:
    The factory.

  Raises:
    ValueError: for an unknown name; the nearest are named.

  Example:
    >>> load("compress.quantize.rtn")(bits=3)
    (compress.quantize.rtn(bits=3),)
  """
  if name not in table.TABLE:
    near = difflib.get_close_matches(name, [*table.TABLE, *recipes.RECIPES], n=3, cutoff=0.4)
    raise ValueError(f"unknown transform {name!r}; did you mean {', '.join(near or table.TABLE)}?")
  module, function = table.TABLE[name].factory.split(":")
  return getattr(importlib.import_module(module), function)


def summary(name: str) -> str:
  """Return a method's one-line description, from its docstring.

  Args:
    name: a name in the table.

  Returns:
    The first line of the factory's docstring.

  Example:
    >>> summary("compress.quantize.rtn").endswith(".")
    True
  """
  return (load(name).__doc__ or "").strip().splitlines()[0]


def _build(node: ast.expr, source: str) -> step.Transform:
  match node:
    case ast.BinOp(op=ast.Add()):
      return _build(node.left, source) + _build(node.right, source)
    case ast.Call(func=ast.Name(id="chain"), keywords=[]):
      return step.chain(*(_build(a, source) for a in node.args))
    case ast.Call(func=ast.Name(id="by_path"), args=[ast.List(elts=rules)], keywords=[]):
      return step.by_path([_rule(r, source) for r in rules])
    case ast.Call(args=[]):
      name = _dotted(node.func, source)
      if name in recipes.RECIPES:
        chain = recipes.RECIPES[name].expression
        if node.keywords:
          raise ValueError(f"{name} is a recipe and takes no arguments; write out {chain}")
        return parse(chain)
      factory = load(name)
      arguments: dict[str, Any] = {}
      for k in node.keywords:
        value = _literal(k, name, source)
        if k.arg in arguments:
          raise ValueError(f"{name}: the argument {k.arg!r} is given twice in {source!r}")
        arguments[str(k.arg)] = value
      return factory(**arguments)
    case ast.Call():
      name = _dotted(node.func, source)
      raise ValueError(f"{name}: arguments are given by name, like {name}(bits=4), in {source!r}")
    case ast.Name() | ast.Attribute():
      name = _dotted(node, source)
      raise ValueError(f"{name!r} is not a call; write {name}() in {source!r}")
    case _:
      raise ValueError(
        f"{ast.unparse(node)!r} is not a transform in {source!r}; "
        "valid are calls of registered names joined by '+'"
      )


def _rule(node: ast.expr, source: str) -> tuple[str, step.Transform]:
  match node:
    case ast.Tuple(elts=[ast.Constant(value=str(pattern)), inner]):
      return pattern, _build(inner, source)
    case _:
      raise ValueError(f"by_path takes (regex, transform) pairs, not {ast.unparse(node)!r}")


def _dotted(node: ast.expr, source: str) -> str:
  match node:
    case ast.Name(id=name):
      return name
    case ast.Attribute(value=inner, attr=name):
      return f"{_dotted(inner, source)}.{name}"
    case _:
      raise ValueError(f"{ast.unparse(node)!r} is not the name of a transform in {source!r}")


def _literal(keyword: ast.keyword, name: str, source: str) -> Any:
  if keyword.arg is None:
    raise ValueError(f"{name}: '**' is not allowed in {source!r}")
  try:
    return ast.literal_eval(keyword.value)
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{name}: the argument {keyword.arg}={ast.unparse(keyword.value)} is not a literal "
      "(a number, a string, True, False, None, or a list of these)"
    ) from error
