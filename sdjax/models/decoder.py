"""One decoder for llama, qwen2, qwen3 and olmo3, as pure functions on a parameter pytree.

The layers are stacked on a leading L axis and scanned, so compile time does not grow with depth.
What attends to what is the caller's: `forward` calls `attend` once per layer, with the layer's
slice of `layer_state` (a KV cache, for example). Knows nothing of files, sampling or losses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sdjax.models import rope as rope_lib
from sdjax.models.attention import segment_attention
from sdjax.models.config import ModelConfig
from sdjax.parallel import PARAM_RULES, constrain, sharding
from sdjax.types import Params

# attend(q_BTHC, k_BTNC, v_BTNC, state_of_layer, window) -> (out_BTHC, state_of_layer)
Attend = Callable[[Array, Array, Array, Any, int | None], tuple[Array, Any]]
# (cos, sin) of full layers and of sliding ones, [B, T, 1, C/2] each
Angles = tuple[tuple[Array, Array], tuple[Array, Array]]
# How many leading axes of a matrix are its input's; the others are its output's.
INPUT_AXES = {"w_q": 1, "w_k": 1, "w_v": 1, "w_o": 2, "w_gate": 1, "w_up": 1, "w_down": 1}
OUTPUT_FIRST_ENTRIES = 2**18  # of a feed-forward matrix: smaller ones stay in a CPU's cache
MAX_PERIOD = 8  # layers unrolled in one step of the scan when their kinds alternate (olmo3: 4)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Axis letters, shape and initialiser: "ones", "zeros" or a standard deviation."""

    letters: str
    shape: tuple[int, ...]
    init: str | float


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The parameter pytree of `cfg` as ParamSpecs."""
    V, D, F, L = cfg.vocab_size, cfg.d_model, cfg.d_ff, cfg.n_layers
    H, N, C = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    residual = (2 * L) ** -0.5  # the residual stream sums 2 L blocks
    layers = {
        "w_q": ParamSpec("LDHC", (L, D, H, C), D**-0.5),
        "w_k": ParamSpec("LDNC", (L, D, N, C), D**-0.5),
        "w_v": ParamSpec("LDNC", (L, D, N, C), D**-0.5),
        "w_o": ParamSpec("LHCD", (L, H, C, D), (H * C) ** -0.5 * residual),
        "w_gate": ParamSpec("LDF", (L, D, F), D**-0.5),
        "w_up": ParamSpec("LDF", (L, D, F), D**-0.5),
        "w_down": ParamSpec("LFD", (L, F, D), F**-0.5 * residual),
        "attn_norm": ParamSpec("LD", (L, D), "ones"),
        "mlp_norm": ParamSpec("LD", (L, D), "ones"),
    }
    if cfg.qkv_bias:
        layers["b_q"] = ParamSpec("LHC", (L, H, C), "zeros")
        layers["b_k"] = ParamSpec("LNC", (L, N, C), "zeros")
        layers["b_v"] = ParamSpec("LNC", (L, N, C), "zeros")
    if cfg.o_bias:
        layers["b_o"] = ParamSpec("LD", (L, D), "zeros")
    if cfg.mlp_bias:
        layers["b_gate"] = ParamSpec("LF", (L, F), "zeros")
        layers["b_up"] = ParamSpec("LF", (L, F), "zeros")
        layers["b_down"] = ParamSpec("LD", (L, D), "zeros")
    if cfg.qk_norm == "head":
        layers["q_norm"] = ParamSpec("LC", (L, C), "ones")
        layers["k_norm"] = ParamSpec("LC", (L, C), "ones")
    if cfg.qk_norm == "projection":
        layers["q_norm"] = ParamSpec("LHC", (L, H, C), "ones")
        layers["k_norm"] = ParamSpec("LNC", (L, N, C), "ones")
    specs = {
        "embed": ParamSpec("VD", (V, D), cfg.init_std),
        "layers": layers,
        "final_norm": ParamSpec("D", (D,), "ones"),
    }
    if not cfg.tie_embeddings:
        specs["head"] = ParamSpec("VD", (V, D), D**-0.5)
    return specs


def is_spec(x: Any) -> bool:
    """Whether `x` is a leaf of `param_specs`."""
    return isinstance(x, ParamSpec)


def init_params(cfg: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters; each leaf's draw depends on the key and the leaf's place alone."""
    leaves, tree = jax.tree.flatten(param_specs(cfg), is_leaf=is_spec)
    keys = jax.random.split(key, len(leaves))

    def draw(spec: ParamSpec, key: Array) -> Array:
        if isinstance(spec.init, str):
            return {"ones": jnp.ones, "zeros": jnp.zeros}[spec.init](spec.shape, dtype)
        return (spec.init * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)

    return tree.unflatten([draw(s, k) for s, k in zip(leaves, keys, strict=True)])


def param_letters(cfg: ModelConfig, mesh: Mesh) -> Params:
    """Axis letters of every parameter as it is placed on `mesh`: those of its ParamSpec.

    Except that a vocabulary that does not split over `tensor` (OLMo-3's 100,278 over 4) stays
    whole: letter 1 instead of V. Logits are split all the same, unevenly.
    """
    whole = cfg.vocab_size % mesh.shape[PARAM_RULES["V"]] != 0
    letters = lambda spec: spec.letters.replace("V", "1") if whole else spec.letters
    return jax.tree.map(letters, param_specs(cfg), is_leaf=is_spec)


def param_shardings(cfg: ModelConfig, mesh: Mesh) -> Params:
    """NamedSharding of every parameter. ValueError when an axis does not split over the mesh."""

    def place(path: Any, spec: ParamSpec, letters: str):
        for letter, size in zip(letters, spec.shape, strict=True):
            axis = PARAM_RULES.get(letter)
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(
                    f"axis {letter} of {name} has {size} entries, which do not split over "
                    f"mesh.{axis}={mesh.shape[axis]}: choose a divisor of {size}"
                )
        return sharding(mesh, letters)

    specs, letters = param_specs(cfg), param_letters(cfg, mesh)
    return jax.tree_util.tree_map_with_path(place, specs, letters, is_leaf=is_spec)


def rms_norm(x: Array, weight: Array, eps: float, axes: int | tuple[int, ...] = -1) -> Array:
    """x / rms(x) * weight over `axes`, in float32 or wider; keeps x's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + eps)
    return (wide * scale * weight.astype(wide.dtype)).astype(x.dtype)


def product(x: Array, layer: Params, name: str, equation: str) -> Array:
    """x W by the einsum `equation` of `x` and the leaf `name`, in either layout of the leaf.

    An output-first leaf (see `output_first`) is called t`name` and is the left operand: XLA's CPU
    backend multiplies a tall matrix by few columns up to twice as fast as few rows by a wide
    matrix, and needs not turn the weights around for many. The barrier keeps it from swapping them
    back.
    """
    if name in layer:
        return _multiply(x, layer[name].astype(x.dtype), equation)
    weight = layer["t" + name].astype(x.dtype)
    inputs = x.ndim - 2
    outputs = weight.shape[: weight.ndim - inputs]
    # one axis of inputs: einsum sums over several in an order for which XLA turns the weights
    x_BTI, weight = x.reshape(*x.shape[:2], -1), weight.reshape(*outputs, -1)
    y = jnp.tensordot(weight, x_BTI, (-1, -1))
    return jnp.moveaxis(jax.lax.optimization_barrier(y), (-2, -1), (0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x_BT: Array, weight: Array, equation: str) -> Array:
    """einsum(equation, x, weight) whose gradient transposes the narrower factor.

    The weight's gradient sums over tokens, for which XLA's CPU backend transposes the left factor.
    Were that the wide one, the transposition would be fused with what computed it (the derivative
    of the activation) and be ten times slower than both.
    """
    return jnp.einsum(equation, x_BT, weight)


def _multiply_forward(x_BT, weight, equation):
    return jnp.einsum(equation, x_BT, weight), (x_BT, weight)  # seen by the remat policy "dots"


def _multiply_backward(equation, saved, d_out_BT):
    x_BT, weight = saved
    rows, inner, out = equation.replace("->", ",").split(",")
    d_x_BT = jnp.einsum(f"{out},{inner}->{rows}", d_out_BT, weight)
    over_tokens = (((0, 1), (0, 1)), ((), ()))
    if x_BT.size <= d_out_BT.size:
        return d_x_BT, jax.lax.dot_general(x_BT, d_out_BT, over_tokens)
    d_weight = jax.lax.dot_general(d_out_BT, x_BT, over_tokens)
    outputs = range(d_out_BT.ndim - 2)
    return d_x_BT, jnp.moveaxis(d_weight, outputs, [axis - len(outputs) for axis in outputs])


_multiply.defvjp(_multiply_forward, _multiply_backward)


def query_key_value(x_BTD: Array, layer: Params, cfg: ModelConfig) -> tuple[Array, ...]:
    """The products x W of the three projections, q [B, T, H, C], k and v [B, T, N, C]."""
    if "tw_qkv" in layer:
        joint = product(x_BTD, layer, "w_qkv", "btd,dhc->bthc")
        return tuple(jnp.split(joint, (cfg.n_heads, cfg.n_heads + cfg.n_kv_heads), axis=2))
    return tuple(product(x_BTD, layer, name, "btd,dhc->bthc") for name in ("w_q", "w_k", "w_v"))


def gate_and_up(x_BTD: Array, layer: Params) -> tuple[Array, ...]:
    """The products x W of the two branches of the feed-forward part, [B, T, F] each."""
    if "tw_gate_up" in layer:
        return tuple(jnp.split(product(x_BTD, layer, "w_gate_up", "btd,df->btf"), 2, axis=2))
    return tuple(product(x_BTD, layer, name, "btd,df->btf") for name in ("w_gate", "w_up"))


def output_first(layer: Params) -> Params:
    """One unstacked layer with its matrices as [output, input], under the names t`name`.

    What reads the same input is one matrix, tw_qkv [H + 2 N, C, D] and tw_gate_up [2 F, D], for
    fewer and larger products. For sampling: adapters must be merged before.
    """
    turn = lambda leaf, n: leaf.transpose(*range(n, leaf.ndim), *range(n))
    turned = {name: turn(layer[name], n) for name, n in INPUT_AXES.items()}
    join = lambda *names: jnp.concatenate([turned.pop(name) for name in names])
    joint = {"tw_qkv": join("w_q", "w_k", "w_v"), "tw_gate_up": join("w_gate", "w_up")}
    rest = {name: leaf for name, leaf in layer.items() if name not in INPUT_AXES}
    return rest | joint | {"t" + name: leaf for name, leaf in turned.items()}


def output_first_letters(letters: dict[str, str]) -> dict[str, str]:
    """The same for the axis letters of a layer; joint outputs stay whole."""
    rest = {name: text for name, text in letters.items() if name not in INPUT_AXES}
    return rest | {"tw_qkv": "1CD", "tw_gate_up": "1D", "tw_o": "DHC", "tw_down": "DF"}


def _linear(x: Array, layer: Params, name: str, equation: str, cfg: ModelConfig, key) -> Array:
    """x W, plus bias and low-rank adapter where there are any; `name` is the leaf's without w_."""
    return _adapt(product(x, layer, "w_" + name, equation), x, layer, name, equation, cfg, key)


def _adapt(y, x, layer: Params, name: str, equation: str, cfg: ModelConfig, key) -> Array:
    """The product `y` = x W with its bias and low-rank adapter added."""
    bias = layer.get("b_" + name)
    if bias is not None:
        y = y + bias.astype(x.dtype)
    adapter = layer.get("lora", {}).get("w_" + name)
    if adapter is None:
        return y
    contracted, out = equation.split(",")[1].split("->")[0], equation.split("->")[1]
    kept = "".join(letter for letter in contracted if letter in out)
    summed = "".join(letter for letter in contracted if letter not in out)
    if key is not None and cfg.lora.dropout > 0:
        kept_mask = jax.random.bernoulli(key, 1.0 - cfg.lora.dropout, x.shape)
        x = jnp.where(kept_mask, x / (1.0 - cfg.lora.dropout), 0.0).astype(x.dtype)
    batch = equation.split(",")[0]
    low = jnp.einsum(f"{batch},{summed}r->btr", x, adapter["a"].astype(x.dtype))
    return y + cfg.lora.scale * jnp.einsum(f"btr,r{kept}->{out}", low, adapter["b"].astype(x.dtype))


def _attention(x, layer, angles, window, state, cfg, attend: Attend, keys):
    q_BTHC, k_BTNC, v_BTNC = query_key_value(x, layer, cfg)
    q_BTHC = _adapt(q_BTHC, x, layer, "q", "btd,dhc->bthc", cfg, keys[0])
    k_BTNC = _adapt(k_BTNC, x, layer, "k", "btd,dnc->btnc", cfg, keys[1])
    v_BTNC = _adapt(v_BTNC, x, layer, "v", "btd,dnc->btnc", cfg, keys[2])
    if cfg.qk_norm != "none":
        axes = -1 if cfg.qk_norm == "head" else (-2, -1)
        q_BTHC = rms_norm(q_BTHC, layer["q_norm"], cfg.norm_eps, axes)
        k_BTNC = rms_norm(k_BTNC, layer["k_norm"], cfg.norm_eps, axes)
    q_BTHC = constrain(rope_lib.rotate(q_BTHC, angles), "BTHC")
    k_BTNC = constrain(rope_lib.rotate(k_BTNC, angles), "BTNC")
    out_BTHC, state = attend(q_BTHC, k_BTNC, constrain(v_BTNC, "BTNC"), state, window)
    out_BTHC = checkpoint_name(constrain(out_BTHC, "BTHC"), "attention")
    return _linear(out_BTHC, layer, "o", "bthc,hcd->btd", cfg, keys[3]), state


def _mlp(x, layer, cfg, keys):
    gate_BTF, up_BTF = gate_and_up(x, layer)
    gate_BTF = _adapt(gate_BTF, x, layer, "gate", "btd,df->btf", cfg, keys[4])
    up_BTF = _adapt(up_BTF, x, layer, "up", "btd,df->btf", cfg, keys[5])
    return _linear(jax.nn.silu(gate_BTF) * up_BTF, layer, "down", "btf,fd->btd", cfg, keys[6])


def _block(x_BTD, layer, state, angles, window, cfg, attend: Attend, key):
    """One layer: (x, layer's parameters, layer's state) -> (x, layer's state)."""
    keys = [None] * 7 if key is None else list(jax.random.split(key, 7))

    def norm(y, name):
        return rms_norm(y, layer[name], cfg.norm_eps)

    if cfg.post_norm:
        out, state = _attention(x_BTD, layer, angles, window, state, cfg, attend, keys)
        x_BTD = constrain(x_BTD + norm(out, "attn_norm"), "BTD")
        return constrain(x_BTD + norm(_mlp(x_BTD, layer, cfg, keys), "mlp_norm"), "BTD"), state
    out, state = _attention(
        norm(x_BTD, "attn_norm"), layer, angles, window, state, cfg, attend, keys
    )
    x_BTD = constrain(x_BTD + out, "BTD")
    return constrain(x_BTD + _mlp(norm(x_BTD, "mlp_norm"), layer, cfg, keys), "BTD"), state


def layer_runs(cfg: ModelConfig) -> list[tuple[int, int, int]]:
    """Cuts the layers into scans: (first layer, number of layers, period of their kinds)."""
    L, windows = cfg.n_layers, cfg.windows
    for period in range(1, min(MAX_PERIOD, L) + 1):
        if L % period == 0 and windows == windows[:period] * (L // period):
            return [(0, L, period)]
    runs, first = [], 0
    for i in range(1, L + 1):
        if i == L or windows[i] != windows[first]:
            runs.append((first, i - first, 1))
            first = i
    return runs


REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def angles_of(positions_BT: Int[Array, "B T"], cfg: ModelConfig) -> Angles:
    """Cosines and sines of these positions, float32, of full layers and of sliding ones."""
    full = sliding = rope_lib.angles(cfg.rope, positions_BT, cfg.head_dim)
    if cfg.rope_sliding != cfg.rope and any(w is not None for w in cfg.windows):
        sliding = rope_lib.angles(cfg.rope_sliding, positions_BT, cfg.head_dim)
    return full, sliding


def forward(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    attend: Attend,
    layer_state: Any = None,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
    dropout_key: Array | None = None,
    angles: Angles | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """Runs all layers; returns the hidden states after the final norm and the new layer state.

    `layer_state` is a pytree whose leaves lead with the L axis; each layer gets its slice. When
    `params["layers"]` is a sequence of layers (`unstack_layers`), they are unrolled instead of
    scanned and `layer_state` is a sequence too: for decoding loops on few layers, where slicing the
    stack at every token would cost more than the layer. `remat` is "none", "full" or "dots".
    `dropout_key` switches the adapters' dropout on. `angles` are `angles_of` the positions,
    where the caller has them already.
    """
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r}: choose one of {', '.join(REMAT)}")
    x_BTD = constrain(params["embed"][tokens_BT].astype(compute_dtype), "BTD")
    full, sliding = angles_of(positions_BT, cfg) if angles is None else angles

    def block(x, layer, state, index, window):
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        cos_sin = full if window is None else sliding
        return _block(x, layer, state, cos_sin, window, cfg, attend, key)

    if remat != "none":
        block = jax.checkpoint(block, policy=REMAT[remat], static_argnums=(4,))
    layers = params["layers"]
    if isinstance(layers, list | tuple):
        states = [None] * cfg.n_layers if layer_state is None else layer_state
        new_states = []
        for i, window in enumerate(cfg.windows):
            x_BTD, state = block(x_BTD, layers[i], states[i], i, window)
            new_states.append(state)
        new_state = None if layer_state is None else type(states)(new_states)
    else:
        x_BTD, new_state = _scan_layers(block, x_BTD, layers, layer_state, cfg)
    return rms_norm(x_BTD, params["final_norm"], cfg.norm_eps), new_state


def _scan_layers(block, x_BTD, layers, layer_state, cfg: ModelConfig):
    """Scans `block` over the stacked layers, one scan per run of `layer_runs`."""
    outs = []
    for first, count, period in layer_runs(cfg):
        windows = cfg.windows[first : first + period]
        whole = count == cfg.n_layers

        def cut(leaf, first=first, count=count, period=period, whole=whole):
            leaf = leaf if whole else leaf[first : first + count]
            return leaf if period == 1 else leaf.reshape(count // period, period, *leaf.shape[1:])

        def body(x, xs, windows=windows, period=period):
            layer, state, index = xs
            if period == 1:
                return block(x, layer, state, index, windows[0])
            states = []
            for i, window in enumerate(windows):
                pick = lambda leaf, i=i: leaf[i]
                x, new = block(
                    x, jax.tree.map(pick, layer), jax.tree.map(pick, state), index[i], window
                )
                states.append(new)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

        xs = jax.tree.map(cut, (layers, layer_state, jnp.arange(cfg.n_layers)))
        x_BTD, out = jax.lax.scan(body, x_BTD, xs)
        outs.append(
            out if period == 1 else jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), out)
        )
    if len(outs) == 1:
        return x_BTD, outs[0]
    return x_BTD, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outs)


def unstack_layers(params: Params, cfg: ModelConfig) -> Params:
    """The same parameters with `layers` as a tuple of layers, for `forward` to unroll."""
    layers = tuple(
        jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(cfg.n_layers)
    )
    return {**params, "layers": layers}


def hidden_states(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
    attention_impl: str = "auto",
    dropout_key: Array | None = None,
) -> Float[Array, "B T D"]:
    """Hidden states of packed rows for training and scoring: causal within each segment."""

    def attend(q, k, v, state, window):
        out = segment_attention(q, k, v, segment_ids_BT, window=window, impl=attention_impl)
        return out, state

    hidden_BTD, _ = forward(
        params,
        tokens_BT,
        positions_BT,
        cfg,
        attend=attend,
        compute_dtype=compute_dtype,
        remat=remat,
        dropout_key=dropout_key,
    )
    return hidden_BTD


def head_weight(params: Params, cfg: ModelConfig) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits, [V, D]; the embedding when they are tied."""
    return params["embed"] if cfg.tie_embeddings else params["head"]


def logits(
    params: Params, hidden_BTD: Float[Array, "B T D"], cfg: ModelConfig
) -> Float[Array, "B T V"]:
    """float32 logits of every position. The training step takes its own chunks instead."""
    weight_VD = head_weight(params, cfg).astype(hidden_BTD.dtype)
    return jnp.einsum("btd,vd->btv", hidden_BTD, weight_VD, preferred_element_type=jnp.float32)


def vocab_first_logits(
    params: Params, hidden_BD: Float[Array, "B D"], cfg: ModelConfig
) -> Float[Array, "V B"]:
    """float32 logits of few rows with the weight on the left: for CPUs, see `product`."""
    weight_VD = head_weight(params, cfg).astype(hidden_BD.dtype)
    logits_VB = jnp.einsum("vd,bd->vb", weight_VD, hidden_BD, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(logits_VB)
