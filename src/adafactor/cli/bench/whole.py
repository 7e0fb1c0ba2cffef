"""Whole training steps, forward and backward passes included: what an optimizer costs where it is used.

A decoder of 40.9 M parameters over one sequence, float32. Every optimizer trains a model of its own, by what its users
call: ``train_on_batch`` of Keras, a jitted step of optax, a loop of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from adafactor.cli.bench.timing import Candidate, Group, Problem, Step

VOCABULARY, WIDTH, LAYERS, HEADS = 8192, 768, 4, 12
#: In a step, and the fraction of the turns: with many tokens an optimizer is a small part of a long step.
TOKENS = {64: 1.0, 1024: 1 / 3}

#: Of a model as ``keras_model`` and ``torch_step`` make it.
PARAMETERS = 2 * VOCABULARY * WIDTH + VOCABULARY + 2 * WIDTH + LAYERS * (12 * WIDTH + 13) * WIDTH

#: Makes a model of so many tokens and an optimizer, and gives the step that trains it.
Make = Callable[[int], Step]


def data(tokens: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, VOCABULARY, (2, 1, tokens)))


# -- Keras -------------------------------------------------------------------------------------------------------------


def keras_model(tokens: int) -> Any:
    from keras import Input, Model, layers, utils

    utils.set_random_seed(0)
    x = inputs = Input((tokens,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(x)
    for _ in range(LAYERS):
        h = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(h, h, use_causal_mask=True)
        h = layers.Dense(4 * WIDTH, "gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(WIDTH)(h)
    return Model(inputs, layers.Dense(VOCABULARY)(layers.LayerNormalization()(x)))


def keras_step(make: Callable[[float], Any], tokens: int, jit: bool) -> Step:
    import keras

    model, loss = keras_model(tokens), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    on_jax = keras.backend.backend() == "jax"  # where a step that is not jitted is none that anybody takes
    model.compile(make(1e-3), loss, jit_compile=jit or on_jax)
    return partial(model.train_on_batch, *data(tokens))


def keras_steps(jit: bool = False) -> dict[str, Make]:
    import keras

    import adafactor.keras

    makes = {"adafactor.keras.Adafactor": adafactor.keras.Adafactor}
    makes |= {f"keras.optimizers.{name}": getattr(keras.optimizers, name) for name in ("SGD", "AdamW", "Adafactor")}
    return {name: partial(keras_step, make, jit=jit) for name, make in makes.items()}


# -- optax, over the Keras model's functional form ---------------------------------------------------------------------


def optax_step(tx: Any, take: Callable[[Any, Any, Any, Any], tuple[Any, Any]], tokens: int) -> Step:
    import jax
    import keras

    model, (x, y) = keras_model(tokens), data(tokens)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    rest = [v.value for v in model.non_trainable_variables]
    params = [v.value.copy() for v in model.trainable_variables]

    def loss(params: Any) -> Any:
        return cross_entropy(y, model.stateless_call(params, rest, x, training=True)[0])

    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        return value, *take(tx, params, state, grads)

    compiled, held = jax.jit(step, donate_argnums=(0, 1)), [params, tx.init(params)]

    def run() -> float:
        value, *held[:] = compiled(*held)
        jax.block_until_ready(held)
        return float(value)

    return run


def optax_steps() -> dict[str, Make]:
    import optax

    from adafactor.optax import adafactor

    def update(tx: Any, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def in_one(tx: Any, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        params, state = tx.step(params, grads, state)
        return params, state

    tx, factored = adafactor(1e-3), adafactor(1e-3, factoring="smallest")  # attention kernels too, as on Keras
    ours = {"update": (tx, update), "step": (tx, in_one), 'step, factoring="smallest"': (factored, in_one)}
    made = {f"adafactor.optax, {how}": made for how, made in ours.items()}
    made |= {f"optax.{name}": (getattr(optax, name)(1e-3), update) for name in ("sgd", "adamw", "adafactor")}
    return {name: partial(optax_step, *how) for name, how in made.items()}


# -- PyTorch -----------------------------------------------------------------------------------------------------------


def torch_step(make: Callable[[Any], Any], tokens: int) -> Step:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    model = nn.ModuleList([nn.Embedding(VOCABULARY, WIDTH), body, nn.Linear(WIDTH, VOCABULARY)])
    optimizer, (x, y) = make(model.parameters()), (torch.from_numpy(each) for each in data(tokens))
    mask = nn.Transformer.generate_square_subsequent_mask(tokens)

    def run() -> float:
        embed, body, head = model
        loss = nn.functional.cross_entropy(head(body(embed(x), mask, is_causal=True)).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def torch_steps() -> dict[str, Make]:
    from torch import optim

    import adafactor.torch

    makes: dict[str, Callable[[Any], Any]] = {
        "adafactor.torch.Adafactor": partial(adafactor.torch.Adafactor, lr=1e-3),
        "torch.optim.SGD(fused=True)": partial(optim.SGD, lr=1e-3, fused=True),
        "torch.optim.AdamW(fused=True)": partial(optim.AdamW, lr=1e-3, fused=True),
        "torch.optim.Adafactor": partial(optim.Adafactor, lr=1e-3),
    }
    return {name: partial(torch_step, make) for name, make in makes.items()}


#: What takes whole steps, by the name of its suite.
STEPS: dict[str, Callable[[], dict[str, Make]]] = {
    "torch": torch_steps,
    "jax": optax_steps,
    "keras-jax": keras_steps,
    "keras-tensorflow": keras_steps,
    "keras-tensorflow-jit": partial(keras_steps, jit=True),
    "keras-torch": keras_steps,
}


def problem(suite: str, tokens: int) -> Problem:
    """Ratios are to the first, which is ours."""

    def candidates() -> dict[str, Candidate]:
        return {name: Candidate(make(tokens)) for name, make in STEPS[suite]().items()}

    title = f"Whole steps, {suite}, {tokens:,} tokens, float32, {PARAMETERS / 1e6:.1f} M parameters"
    return Problem(title, {"suite": suite, "tokens": tokens}, PARAMETERS, [Group(candidates, TOKENS.get(tokens, 1.0))])


def problems(suite: str) -> list[Problem]:
    return [problem(suite, tokens) for tokens in TOKENS]
