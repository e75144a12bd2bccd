# SPDX-License-Identifier: Apache-2.0
"""A relaxed network written edge by edge from the papers, slow on purpose: the production one is held to it.

One convolution, one batch norm and one quantiser per operation and edge, NCHW, ordinary autograd. It shares no line
with common/: DARTS, PC-DARTS and the quantised PC-DARTS follow the papers and ../oracles/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
QUANTISED = ("skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
ROWS = {"normal": QUANTISED[1:], "reduce": QUANTISED}  # the primitives with a gamma row: a normal skip has no weights
HWGQ_STEP = {1: 0.799, 2: 0.538, 3: 0.3217, 4: 0.185}
GAUSS_STEP = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.336}
TINY = 1e-9


def straight_through(x: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """`value` in the forward pass; the gradient of x, times `mask` where one is given, in the backward pass."""
    value = value.detach()
    passed = x if mask is None else x * mask.detach()
    return value + (passed - passed.detach())


class Clamp(torch.autograd.Function):
    """x between 0 and `top`; passes the gradient there, bounds included (in torch that depends on the release)."""

    @staticmethod
    def forward(ctx, x: Tensor, top: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.top = top
        return x.clamp(0.0, top)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where((x > -TINY) & (x <= ctx.top), gradient, 0.0), None


class Round(torch.autograd.Function):
    """The nearest multiple of `step`; the gradient is the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, step: float) -> Tensor:
        return torch.round(x / step) * step

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def hwgq(x: Tensor, bits: int) -> Tensor:
    """Half-wave Gaussian quantiser of 1-4 bits: 2^b levels from 0; inclusive mask; |x| < 1e-9 counts as 0."""
    step = HWGQ_STEP[bits]
    return Round.apply(Clamp.apply(x, step * (2**bits - 1)), step)


class Gaussian(torch.autograd.Function):
    """Mid-rise weight quantiser of 1-4 bits by the tensor's unbiased deviation; the gradient is the identity."""

    @staticmethod
    def forward(ctx, w: Tensor, bits: int, deviation: Tensor | float) -> Tensor:
        step = GAUSS_STEP[bits] * deviation
        bound = (2**bits / 2 - 0.5) * step
        return ((torch.round(w / step + 0.5) - 0.5) * step).clamp(-bound, bound)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def eight_bits_reference(x: Tensor) -> Tensor:
    """The reference's 8 bits: range per dim-1 channel of this very tensor; half-wave when nothing is below -0.05."""
    low = x.detach().amin(dim=(0, 2, 3), keepdim=True)
    high = x.detach().amax(dim=(0, 2, 3), keepdim=True)
    flat = torch.where(x.abs() < TINY, torch.zeros_like(x), x).detach()
    if float(low.min()) >= -0.05:
        scale = ((high - low) / 255).clamp_min(1e-12)
        value = torch.round(flat / scale).clamp(0, 255) * scale
        mask = (flat >= 0) & (flat <= high - low)
    else:
        scale = (2 * torch.maximum(low.abs(), high.abs()) / 255).clamp_min(1e-12)
        value = ((torch.round(flat / scale + 0.5) - 0.5) * scale).clamp(-127 * scale, 127 * scale)
        mask = (x.detach() >= -127 * scale) & (x.detach() <= 127 * scale)
    return straight_through(x, value, mask.to(x.dtype))


class MixedConv(nn.Conv2d):
    """A convolution of softmax-weighted quantised operands; its cell sets `logits` = (activation, weight).

    Reads a weight's deviation (once a bit-width) and its own size back to the host, unless it is `tuned`.
    """

    def __init__(
        self, *args: int, bits: tuple[int, ...] | None, scheme: str, tuned: bool = False, **kwargs: int
    ) -> None:
        super().__init__(*args, bias=False, **kwargs)
        self.bits, self.scheme, self.tuned = bits, scheme, tuned
        self.logits: tuple[Tensor, Tensor] | None = None
        self.register_buffer("maximum", torch.tensor(-1.0))
        self.register_buffer("size", torch.tensor(0.0), persistent=False)
        self.size_number = 0.0
        self.update_range = True

    def _activation8(self, x: Tensor) -> Tensor:
        if self.scheme == "reference":
            return eight_bits_reference(x)
        batch = x.detach().amax().clamp_min(0)
        if self.training and self.update_range:
            self.maximum.copy_(batch if self.maximum < 0 else self.maximum + 0.1 * (batch - self.maximum))
        top = self.maximum.clone() if self.maximum >= 0 else batch
        scale = top / 255 if top > 0 else torch.ones_like(top)
        flat = torch.where(x.abs() < TINY, torch.zeros_like(x), x).detach()
        value = torch.round(flat.clamp(0.0, float(top)) / scale) * scale
        return straight_through(x, value, ((flat >= 0) & (flat <= top)).to(x.dtype))

    def _weight8(self, w: Tensor) -> Tensor:
        if self.scheme == "reference":
            return eight_bits_reference(w)
        scale = w.detach().abs().amax(dim=(1, 2, 3), keepdim=True) / 127
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return straight_through(w, torch.round(w.detach() / scale) * scale)

    def quantised_activation(self, x: Tensor, bits: int) -> Tensor:
        """One choice of the activation mixture."""
        return x if bits == 32 else self._activation8(x) if bits == 8 else hwgq(x, bits)

    def levels(self, x: Tensor) -> list[Tensor]:
        """Every choice of the activation mixture."""
        assert self.bits is not None
        return [self.quantised_activation(x, bits) for bits in self.bits]

    def quantised_weight(self, bits: int) -> Tensor:
        """One choice of the weight mixture."""
        w = self.weight
        if bits == 32:
            return w
        if bits == 8:
            return self._weight8(w)
        deviation = w.detach().std()
        return Gaussian.apply(w, bits, deviation if self.tuned else deviation.item())

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """x, or the choices of its mixture where they are shared (`levels`)."""
        self._keep_size(x[0] if isinstance(x, list) else x)
        if self.bits is None:
            return self._conv_forward(x, self.weight, None)
        assert self.logits is not None
        for_activation, for_weight = (F.softmax(logits, dim=-1) for logits in self.logits)
        levels = x if isinstance(x, list) else (self.quantised_activation(x, b) for b in self.bits)
        x = sum(for_activation[i] * level for i, level in enumerate(levels))
        w = sum(for_weight[i] * self.quantised_weight(b) for i, b in enumerate(self.bits))
        return self._conv_forward(x, w, None)

    def _keep_size(self, x: Tensor) -> None:
        """The paper's group-blind size in millions: Cin Cout k k H W / stride^2, H and W those of the input."""
        kernel = self.kernel_size[0] * self.kernel_size[1]
        size = self.in_channels * self.out_channels * kernel * 1e-6 * x.shape[2] * x.shape[3]
        self.size_number = size / self.stride[0] ** 2
        if self.bits is not None and not self.tuned:
            self.size.copy_(torch.tensor(self.size_number, dtype=self.size.dtype))

    def size_product(self) -> float:
        """The size that the last forward saw."""
        return self.size_number if self.tuned or self.bits is None else self.size.item()

    def expected_bits(self) -> list[Tensor]:
        """Expected activation and weight bits under the present logits."""
        assert self.logits is not None and self.bits is not None
        shares = [F.softmax(logits, dim=-1) for logits in self.logits]
        return [sum(share[i] * b for i, b in enumerate(self.bits)) for share in shares]


class Branch(nn.Module):
    """A candidate operation; `convolutions` lists its convolutions in the order of use.

    forward: x, and the choices of its first convolution's mixture where all readers of a state share them.
    """

    convolutions: list[MixedConv]


class Relu1x1(Branch):
    """ReLU, 1x1 convolution, BN."""

    def __init__(self, c_in: int, c_out: int, **q: object) -> None:
        super().__init__()
        self.conv = MixedConv(c_in, c_out, 1, **q)
        self.bn = nn.BatchNorm2d(c_out, affine=False)
        self.convolutions = [self.conv]

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(F.relu(x)))


class Halve(Branch):
    """Factorised reduction: two shifted stride-2 1x1 convolutions side by side."""

    def __init__(self, c_in: int, c_out: int, **q: object) -> None:
        super().__init__()
        self.conv1 = MixedConv(c_in, c_out // 2, 1, stride=2, **q)
        self.conv2 = MixedConv(c_in, c_out - c_out // 2, 1, stride=2, **q)
        self.bn = nn.BatchNorm2d(c_out, affine=False)
        self.convolutions = [self.conv1, self.conv2]

    def forward(self, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        x = F.relu(x)
        return self.bn(torch.cat([self.conv1(levels or x), self.conv2(x[:, :, 1:, 1:])], dim=1))


class Separable(Branch):
    """Depthwise, pointwise, BN, twice; the first depthwise carries the stride."""

    def __init__(self, c: int, kernel: int, stride: int, **q: object) -> None:
        super().__init__()
        pad = kernel // 2
        self.depthwise1 = MixedConv(c, c, kernel, stride=stride, padding=pad, groups=c, **q)
        self.pointwise1 = MixedConv(c, c, 1, **q)
        self.bn1 = nn.BatchNorm2d(c, affine=False)
        self.depthwise2 = MixedConv(c, c, kernel, padding=pad, groups=c, **q)
        self.pointwise2 = MixedConv(c, c, 1, **q)
        self.bn2 = nn.BatchNorm2d(c, affine=False)
        self.convolutions = [self.depthwise1, self.pointwise1, self.depthwise2, self.pointwise2]

    def forward(self, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        x = self.bn1(self.pointwise1(self.depthwise1(levels or F.relu(x))))
        return self.bn2(self.pointwise2(self.depthwise2(F.relu(x))))


class Dilated(Branch):
    """Depthwise with dilation 2, pointwise, BN."""

    def __init__(self, c: int, kernel: int, stride: int, **q: object) -> None:
        super().__init__()
        self.depthwise = MixedConv(c, c, kernel, stride=stride, padding=kernel - 1, dilation=2, groups=c, **q)
        self.pointwise = MixedConv(c, c, 1, **q)
        self.bn = nn.BatchNorm2d(c, affine=False)
        self.convolutions = [self.depthwise, self.pointwise]

    def forward(self, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        return self.bn(self.pointwise(self.depthwise(levels or F.relu(x))))


class Pool(Branch):
    """3x3 pooling and BN."""

    def __init__(self, kind: str, c: int, stride: int) -> None:
        super().__init__()
        self.kind, self.stride = kind, stride
        self.bn = nn.BatchNorm2d(c, affine=False)
        self.convolutions = []

    def forward(self, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        if self.kind == "max":
            return self.bn(F.max_pool2d(x, 3, self.stride, 1))
        return self.bn(F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False))


class Nothing(Branch):
    """`none`: zeros of the output's size."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride, self.convolutions = stride, []

    def forward(self, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride] * 0.0


class Pass(Branch):
    """`skip_connect` at stride 1."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = []

    def forward(self, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        return x


def candidate(name: str, c: int, stride: int, **q: object) -> Branch:
    """One operation by its name."""
    if name == "none":
        return Nothing(stride)
    if name.endswith("pool_3x3"):
        return Pool(name[:3], c, stride)
    if name == "skip_connect":
        return Pass() if stride == 1 else Halve(c, c, **q)
    kernel = int(name[-1])
    return Separable(c, kernel, stride, **q) if name.startswith("sep") else Dilated(c, kernel, stride, **q)


class Edge(nn.Module):
    """All candidate operations of an edge on the first 1/k of the channels, then the channel shuffle."""

    def __init__(self, c: int, stride: int, k: int, **q: object) -> None:
        super().__init__()
        self.k, self.stride = k, stride
        self.candidates = nn.ModuleDict({name: candidate(name, c // k, stride, **q) for name in OPERATIONS})

    def levels(self, x: Tensor) -> list[Tensor]:
        """The choices of what every operation of this edge that starts with a ReLU reads."""
        reader = next(b.convolutions[0] for b in self.candidates.values() if b.convolutions)
        return reader.levels(F.relu(x[:, : x.shape[1] // self.k]))

    def forward(self, x: Tensor, weights: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        part = x.shape[1] // self.k
        head, rest = x[:, :part], x[:, part:]
        head = sum(w * branch(head, levels) for w, branch in zip(weights, self.candidates.values(), strict=True))
        if self.k == 1:
            return head
        rest = F.max_pool2d(rest, 2, 2) if self.stride == 2 else rest
        joined = torch.cat([head, rest], dim=1)
        b, c, h, w = joined.shape
        return joined.reshape(b, self.k, c // self.k, h, w).transpose(1, 2).reshape(b, c, h, w)


class PlainCell(nn.Module):
    """One cell; `reduction` halves the image, `after_reduction` says that the cell before did."""

    def __init__(self, c_pp: int, c_p: int, c: int, reduction: bool, after_reduction: bool, options: dict) -> None:
        super().__init__()
        q = {name: options[name] for name in ("bits", "scheme", "tuned")}
        self.shared = options["tuned"] and options["bits"] is not None
        self.nodes, self.multiplier, self.reduction = options["nodes"], options["multiplier"], reduction
        self.preprocess0 = Halve(c_pp, c, **q) if after_reduction else Relu1x1(c_pp, c, **q)
        self.preprocess1 = Relu1x1(c_p, c, **q)
        self.edges = nn.ModuleList(
            Edge(c, 2 if reduction and source < 2 else 1, options["k"], **q)
            for node in range(self.nodes)
            for source in range(2 + node)
        )

    def forward(self, s0: Tensor, s1: Tensor, alpha: Tensor, beta: Tensor | None) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        levels: list[list[Tensor] | None] = []
        edge = 0
        for _ in range(self.nodes):
            total: Tensor | float = 0.0
            for source in range(len(states)):
                if source == len(levels):
                    levels.append(self.edges[edge].levels(states[source]) if self.shared else None)
                out = self.edges[edge](states[source], alpha[edge], levels[source])
                total = total + (out if beta is None else beta[edge] * out)
                edge += 1
            states.append(total)
        return torch.cat(states[-self.multiplier :], dim=1)


def beta_weights(logits: Tensor, nodes: int) -> Tensor:
    """Softmax within each node's incoming edges."""
    parts, start = [], 0
    for node in range(nodes):
        parts.append(F.softmax(logits[start : start + node + 2], dim=0))
        start += node + 2
    return torch.cat(parts)


class PlainSupernet(nn.Module):
    """The relaxed network; bits None is full precision; gammas as common.nets promises: one row per name of ROWS.

    `tuned`: the same function without reads of the host, each state quantised once for all its readers, and
    channels-last.
    """

    def __init__(
        self,
        *,
        method: str = "darts",
        bits: tuple[int, ...] | None = None,
        stem: str = "cifar",
        in_channels: int = 3,
        num_classes: int = 10,
        init_channels: int = 8,
        layers: int = 3,
        partial: int = 4,
        scheme: str = "default",
        nodes: int = 4,
        multiplier: int = 4,
        tuned: bool = False,
    ) -> None:
        super().__init__()
        pc, c = method == "pc-darts", init_channels
        self.stem_kind, self.nodes, self.bits, self.tuned = stem, nodes, bits, tuned
        options = {"bits": bits, "scheme": scheme, "k": partial if pc else 1, "nodes": nodes, "multiplier": multiplier}
        options["tuned"] = tuned
        self.convolution_names = [name for name in OPERATIONS if name in QUANTISED]
        if stem == "cifar":
            c_pp = c_p = 3 * c
            self.stem = nn.Sequential(nn.Conv2d(in_channels, c_p, 3, padding=1, bias=False), nn.BatchNorm2d(c_p))
        else:
            c_pp = c_p = width = 3 * c  # the search multiplies the stem here too; the oracle counts it so
            self.stem0 = nn.Sequential(
                nn.Conv2d(in_channels, width // 2, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width // 2),
                nn.ReLU(),
                nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            conv = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
            self.stem1 = nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(width))
        self.cells = nn.ModuleList()
        after = stem == "imagenet"
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            c = 2 * c if reduction else c
            self.cells.append(PlainCell(c_pp, c_p, c, reduction, after, options))
            after, c_pp, c_p = reduction, c_p, multiplier * c
        self.classifier = nn.Linear(c_p, num_classes)
        edges = sum(2 + node for node in range(nodes))
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(edges, len(OPERATIONS)))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(edges, len(OPERATIONS)))
        self.betas_normal = nn.Parameter(1e-3 * torch.randn(edges)) if pc else None
        self.betas_reduce = nn.Parameter(1e-3 * torch.randn(edges)) if pc else None
        self.gammas = nn.ParameterDict()
        if bits is not None:
            self._make_gammas(edges, len(bits))

    def _make_gammas(self, edges: int, choices: int) -> None:
        for kind, reduction in (("normal", False), ("reduce", True)):
            cells = sum(cell.reduction == reduction for cell in self.cells)
            for what in ("activation", "weight"):
                shape = (cells, edges, len(ROWS[kind]), choices)
                self.gammas[f"{kind}_{what}"] = nn.Parameter(1e-3 * torch.randn(shape))
                for p in (0, 1):
                    self.gammas[f"{kind}_{what}_preprocess{p}"] = nn.Parameter(1e-3 * torch.randn(cells, choices))

    def gamma_parameters(self) -> list[nn.Parameter]:
        """All bit logits."""
        return list(self.gammas.values())

    def arch_parameters(self) -> list[nn.Parameter]:
        """Alphas, then betas where there are any."""
        both = [self.alphas_normal, self.alphas_reduce, self.betas_normal, self.betas_reduce]
        return [p for p in both if p is not None]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Everything else."""
        others = {id(p) for p in self.gamma_parameters() + self.arch_parameters()}
        return [p for p in self.parameters() if id(p) not in others]

    def bind_gammas(self) -> None:
        """Hand every convolution the rows that it reads."""
        if self.bits is None:
            return
        count = {"normal": 0, "reduce": 0}
        for cell in self.cells:
            kind = "reduce" if cell.reduction else "normal"
            n = count[kind]
            count[kind] += 1
            for p in (0, 1):
                own = tuple(self.gammas[f"{kind}_{w}_preprocess{p}"][n] for w in ("activation", "weight"))
                for conv in getattr(cell, f"preprocess{p}").convolutions:
                    conv.logits = own
            tables = [self.gammas[f"{kind}_{w}"][n] for w in ("activation", "weight")]
            for e, edge in enumerate(cell.edges):
                of_edge = [table[e] for table in tables]
                for row, name in enumerate(ROWS[kind]):
                    if edge.candidates[name].convolutions:
                        own = tuple(rows[row] for rows in of_edge)
                        for conv in edge.candidates[name].convolutions:
                            conv.logits = own

    def mixed_convolutions(self) -> list[MixedConv]:
        """Every convolution of the cells, preprocessing first within a cell."""
        return [m for m in self.modules() if isinstance(m, MixedConv)]

    @contextmanager
    def side_pass(self) -> Iterator[None]:
        """Forwards inside leave the running ranges alone."""
        for conv in self.mixed_convolutions():
            conv.update_range = False
        yield
        for conv in self.mixed_convolutions():
            conv.update_range = True

    def complexity(self) -> Tensor:
        """The reference's complexity of the last forward pass: sum of size E[a] E[w] over the first convolution's."""
        total = torch.zeros((), dtype=torch.float64)
        for conv in self.mixed_convolutions():
            activation, weight = conv.expected_bits()
            total = total + conv.size_product() * activation * weight
        return total / self.cells[0].preprocess0.convolutions[0].size_product()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        self.bind_gammas()
        if self.tuned:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.stem_kind == "cifar":
            s0 = s1 = self.stem(x)
        else:
            s0 = self.stem0(x)
            s1 = self.stem1(s0)
        for cell in self.cells:
            kind = "reduce" if cell.reduction else "normal"
            alpha = F.softmax(getattr(self, f"alphas_{kind}"), dim=-1)
            beta = getattr(self, f"betas_{kind}")
            beta = None if beta is None else beta_weights(beta, self.nodes)
            s0, s1 = s1, cell(s0, s1, alpha, beta)
        return self.classifier(s1.mean(dim=(2, 3)))


# the reference's slot of each row of ROWS: skip_connect wraps round to the last
REFERENCE_SLOTS = {"normal": (0, 1, 2, 3), "reduce": (5, 0, 1, 2, 3)}
REFERENCE_NAMES = {"normal": "n", "reduce": "r", "activation": "activ", "weight": "weight"}


def reference_gamma_name(key: str) -> str:
    """`normal_activation_preprocess0` -> `gamma_activ_celln_preprocess0`, the name in qdarts.json."""
    kind, what, *rest = key.split("_")
    return "_".join([f"gamma_{REFERENCE_NAMES[what]}_cell{REFERENCE_NAMES[kind]}", *rest])


@torch.no_grad()
def fill_reference_gammas(model: nn.Module) -> nn.Module:
    """Fill gammas as the oracle did on the reference's six slots: activations by the sine, weights by the cosine."""
    for key, gamma in model.gammas.items():
        wave = torch.sin if "activation" in key else torch.cos
        if "preprocess" in key:
            index = torch.arange(gamma.numel(), dtype=torch.float64)
            gamma.copy_(wave(index * index).reshape(gamma.shape))
        else:
            cells, edges, rows, choices = gamma.shape
            slots = REFERENCE_SLOTS[key.split("_")[0]]
            assert rows == len(slots)
            index = torch.arange(cells * edges * 6 * choices, dtype=torch.float64)
            full = wave(index * index).reshape(cells, edges, 6, choices)
            gamma.copy_(full[:, :, list(slots)])
    return model


@torch.no_grad()
def copy_into(plain: PlainSupernet, supernet: nn.Module) -> None:
    """Copy stem, classifier, convolutions, alphas, betas and gammas of the plain network into the production one."""
    for name in ("stem", "stem0", "stem1", "classifier"):
        if hasattr(plain, name):
            mine, theirs = getattr(plain, name), getattr(supernet, name)
            pairs = zip(_leaves(mine), _leaves(theirs), strict=True)
            for a, b in pairs:
                b.load_state_dict(a.state_dict())
    for mine, theirs in paired_convolutions(plain, supernet):
        assert mine.weight.shape == theirs.weight.shape
        theirs.weight.copy_(mine.weight)
    for name in ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"):
        value = getattr(plain, name)
        assert (value is None) == (getattr(supernet, name) is None), name
        if value is not None:
            getattr(supernet, name).copy_(value)
    assert set(plain.gammas) == set(supernet.gammas)
    for key, value in plain.gammas.items():
        assert supernet.gammas[key].shape == value.shape, key
        supernet.gammas[key].copy_(value)


def _leaves(module: nn.Module) -> list[nn.Module]:
    """Modules that own tensors, in order."""
    return [m for m in module.modules() if list(m.parameters(recurse=False)) or list(m.buffers(recurse=False))]


def paired_convolutions(plain: PlainSupernet, supernet: nn.Module) -> list[tuple[MixedConv, nn.Conv2d]]:
    """Every convolution of the plain cells with its counterpart in the production network."""
    pairs: list[tuple[MixedConv, nn.Conv2d]] = []
    for mine, theirs in zip(plain.cells, supernet.cells, strict=True):
        for name in ("preprocess0", "preprocess1"):
            pairs += zip(getattr(mine, name).convolutions, _convolutions(getattr(theirs, name)), strict=True)
        for e, edge in enumerate(mine.edges):
            for name in QUANTISED:
                if edge.candidates[name].convolutions:
                    operation = theirs.operations[e][name]
                    pairs += zip(edge.candidates[name].convolutions, _convolutions(operation), strict=True)
    return pairs


def _convolutions(operation: nn.Module) -> list[nn.Conv2d]:
    """An operation's convolutions in the order of use."""
    own = getattr(operation, "convolutions", None)
    return list(own() if callable(own) else own) if own is not None else [operation.conv]
