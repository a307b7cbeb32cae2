"""LaMambaUNet: grids, batches, dtypes, initialisation, removed blocks, input checks, saving."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.registry import lookup_backend

from lamamba import LaMambaUNet, UNetConfig
from lamamba.inference.compiling import compile_network, find_compiler
from lamamba.models.attention import WindowAttention
from lamamba.models.embeddings import TimestepEmbedding, position_table
from lamamba.models.geometry import make_geometry
from lamamba.ops import native, use_backend
from lamamba.pretrained import SHIPPED_MODELS
from lamamba.runs.model import open_network
from tests.networks import random_inputs, random_network, relative_error, small_config, two_blocks

MILLIONS = {"s": "26.71", "b": "105.31", "l": "418.21", "xl": "652.48"}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = LaMambaUNet(UNetConfig.preset(name))
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == MILLIONS[name]


@torch.no_grad()
@pytest.mark.parametrize("grid", [(8, 8), (8, 20), (12, 4), (28, 12), (4, 4)])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("scan", ["continuous", "cross"])
def test_runs_on_any_grid_of_multiples_of_four(grid, patch_size, scan):
    config = small_config(grid=grid, patch_size=patch_size, scan=scan)
    x, t, y = random_inputs(config)
    output = random_network(config)(x, t, y)
    assert output.shape == (2, 8, grid[0] * patch_size, grid[1] * patch_size)
    assert output.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("grid", [(8, 8), (12, 20)])
def test_images_of_a_batch_do_not_influence_each_other(grid):
    config = small_config(grid=grid)
    model = random_network(config)
    x, t, y = random_inputs(config)
    before = model(x, t, y)
    x[1] = math.nan
    after = model(x, t, y)
    assert torch.equal(before[0], after[0])
    assert after[1].isnan().all()


@torch.no_grad()
def test_output_is_independent_of_the_batch_size():
    config = small_config(state_size=2)
    model = random_network(config)
    x, t, y = random_inputs(config, batch=7)
    together = model(x, t, y)
    apart = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(7)])
    assert relative_error(apart, together) <= 1e-5


def test_every_parameter_has_a_gradient():
    config = small_config()
    model = random_network(config)
    x, t, y = random_inputs(config)
    model(x, t, y).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_float64_agrees_with_float32():
    config = small_config()
    x, t, y = random_inputs(config)
    single = random_network(config)(x, t, y)
    with use_backend("reference"):
        assert relative_error(single, random_network(config).double()(x.double(), t, y).float()) <= 1e-5


class TestBfloat16:
    """Outputs within 2 % of float32's, training losses within 5 %."""

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    @pytest.mark.parametrize("changes", [
        {}, {"state_size": 16}, {"patch_size": 2}, {"scan": "cross", "num_classes": 0},
    ])
    def test_outputs(self, backend, changes):
        if backend == "cpu" and native.load() is None:
            pytest.skip("no compiled kernels")
        config = small_config(width=32, **changes)
        x, t, y = random_inputs(config)
        with torch.no_grad(), use_backend(backend):
            single = random_network(config)(x, t, y)
            with torch.autocast("cpu", torch.bfloat16):
                mixed = random_network(config)(x, t, y).float()
            half = random_network(config).bfloat16()(x.bfloat16(), t, y).float()
        assert (half - single).norm() <= 2e-2 * single.norm()
        assert (mixed - single).norm() <= 2e-2 * single.norm()

    def test_training_under_autocast(self):
        config = two_blocks(in_channels=1, objective="flow")
        random = torch.Generator().manual_seed(2)
        images = torch.rand(3, 1, 8, 8, generator=random).round() * 2 - 1
        eps = torch.randn(24, 1, 8, 8, generator=random)
        labels, time = torch.arange(24) % 3, torch.rand(24, generator=random)
        x0, share = images[labels], time[:, None, None, None]
        xt, velocity = (1 - share) * x0 + share * eps, eps - x0
        losses = {}
        for mixed in (False, True):
            torch.manual_seed(0)
            model = LaMambaUNet(config)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
            losses[mixed] = []
            for _ in range(30):
                with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                    output = model(xt, 1000 * time, labels)
                loss = (output.float() - velocity).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[mixed].append(loss.item())
        assert sum(losses[False][-5:]) < 0.6 * sum(losses[False][:5])
        assert losses[True] == pytest.approx(losses[False], rel=0.05)           # step by step


class TestAnotherGrid:
    """set_grid: running on another grid than the configuration's."""

    @torch.no_grad()
    def test_needs_set_grid(self):
        model = random_network(small_config())
        x, t, y = random_inputs(model.architecture, grid=(12, 16))
        with pytest.raises(ValueError, match=r"model.set_grid\(\(12, 16\)\)"):
            model(x, t, y)
        model.set_grid((12, 16))
        assert model(x, t, y).shape == (2, 8, 12, 16)
        with pytest.raises(ValueError, match="the network reads"):
            model(*random_inputs(model.architecture))

    @torch.no_grad()
    def test_and_back(self):
        model = random_network(small_config())
        inputs = random_inputs(model.architecture)
        before = model(*inputs)
        model.set_grid(16)
        model.set_grid(None)
        assert torch.equal(model(*inputs), before)

    def test_windows_stay_and_positions_are_interpolated(self):
        model = random_network(small_config(grid=(8, 8), window_size=4))
        assert model.architecture.stage_window(2) == (2, 2)
        model.set_grid((20, 12))
        assert [g.window for g in model.geometries] == [(4, 4), (4, 4), (2, 2)]
        resized = model._positions()
        table = model.position_embedding.detach()
        expected = F.interpolate(table.permute(2, 0, 1)[None], (20, 12), mode="bicubic")[0].permute(1, 2, 0)
        assert torch.equal(resized, expected)

    def test_refuses_grids_that_cannot_be_halved_twice(self):
        with pytest.raises(ValueError, match="use 12 or 16 instead of 14"):
            random_network(small_config()).set_grid((14, 8))


class TestWindowAttention:
    """WindowAttention against attention written out token by token."""

    @staticmethod
    def written_out(attention: WindowAttention, x, window, shifted):
        """Each token attends to the tokens of its window, found by coordinates on the shifted grid."""
        b, h, w, c = x.shape
        wh, ww = window
        sh, sw = (wh // 2 if shifted and h > wh else 0), (ww // 2 if shifted and w > ww else 0)
        q, k, v = attention.qkv(x).view(b, h, w, 3, attention.num_heads, -1).unbind(3)
        H, W = -(-h // wh) * wh, -(-w // ww) * ww

        def locate(i, shift, padded, side):
            """Window, index in it, and whether the roll wrapped this line around the edge."""
            rolled = (i - shift) % padded
            return rolled // side, rolled % side, i < shift

        y = torch.zeros_like(q)
        for i in range(h):
            for j in range(w):
                row, column = locate(i, sh, H, wh), locate(j, sw, W, ww)
                keys = [
                    (a, e) for a in range(h) for e in range(w)
                    if locate(a, sh, H, wh)[::2] == row[::2] and locate(e, sw, W, ww)[::2] == column[::2]
                ]
                for head in range(attention.num_heads):
                    scores = torch.stack([
                        (q[:, i, j, head] * k[:, a, e, head]).sum(-1) * q.shape[-1] ** -0.5
                        + attention.bias_table[
                            (row[1] - locate(a, sh, H, wh)[1] + wh - 1) * (2 * ww - 1)
                            + column[1] - locate(e, sw, W, ww)[1] + ww - 1, head]
                        for a, e in keys
                    ], -1).softmax(-1)
                    values = torch.stack([v[:, a, e, head] for a, e in keys], 1)
                    y[:, i, j, head] = (scores[..., None] * values).sum(1)
        return attention.out_proj(y.reshape(b, h, w, c))

    @torch.no_grad()
    @pytest.mark.parametrize("shifted", [False, True])
    @pytest.mark.parametrize(("grid", "window"), [
        ((8, 8), (4, 4)), ((4, 8), (4, 4)), ((6, 7), (4, 4)), ((3, 10), (4, 4)), ((9, 4), (4, 2)),
    ])
    def test_every_grid_and_shift(self, grid, window, shifted):
        torch.manual_seed(0)
        attention = WindowAttention(8, 2, window, shifted)
        attention.bias_table.normal_()
        x = torch.randn(2, *grid, 8)
        expected = self.written_out(attention, x, window, shifted)
        geometry = make_geometry(grid, window, "continuous")
        torch.testing.assert_close(attention(x, geometry), expected, rtol=1e-4, atol=1e-5)


class TestCachedBias:
    """The gathered bias is cached, and gathered again whenever its table has changed."""

    WINDOW = (4, 4)

    @pytest.fixture
    def attention(self):
        torch.manual_seed(0)
        attention = WindowAttention(8, 2, self.WINDOW, shifted=True)
        attention.reset_parameters()
        return attention

    def output(self, attention, dtype=torch.float32):
        x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        return attention(x, make_geometry((8, 8), self.WINDOW, "continuous"))

    def check_is_fresh(self, attention, dtype=torch.float32):
        with torch.no_grad():
            kept = self.output(attention, dtype)
            attention._cached_bias = None
            torch.testing.assert_close(kept, self.output(attention, dtype), rtol=0, atol=0, equal_nan=True)

    @torch.no_grad()
    def test_is_gathered_once(self, attention):
        self.output(attention)
        bias = attention._cached_bias[-1]
        self.output(attention)
        assert attention._cached_bias[-1] is bias

    @pytest.mark.parametrize("change", [
        lambda a: a.bias_table.mul_(2),
        lambda a: a.bias_table.data.mul_(2),
        lambda a: a.bias_table.data[3].fill_(math.nan),
        lambda a: setattr(a, "bias_table", torch.nn.Parameter(2 * a.bias_table)),
        lambda a: a.load_state_dict({name: 2 * value for name, value in a.state_dict().items()}),
        lambda a: a.load_state_dict({name: 2 * value for name, value in a.state_dict().items()}, assign=True),
        lambda a: torch.nn.init.normal_(a.bias_table),
    ], ids=["in place", "data", "nan", "another parameter", "load", "assign", "init"])
    def test_follows_the_table(self, attention, change):
        with torch.no_grad():
            before = self.output(attention)
            change(attention)
            assert not torch.equal(self.output(attention), before)
        self.check_is_fresh(attention)

    def test_follows_the_optimizer_and_leaves_gradients_alone(self, attention):
        with torch.no_grad():
            self.output(attention)
        optimizer = torch.optim.SGD([attention.bias_table], lr=1.0)
        self.output(attention).square().sum().backward()
        assert attention.bias_table.grad.any()
        optimizer.step()
        self.check_is_fresh(attention)

    def test_follows_the_precision(self, attention):
        self.check_is_fresh(attention)
        self.check_is_fresh(attention.double(), torch.float64)
        self.check_is_fresh(attention.bfloat16(), torch.bfloat16)

    def test_is_copied_with_the_module_and_not_saved(self, attention):
        with torch.inference_mode():
            expected = self.output(attention)
        names = set(attention.state_dict())
        again = copy.deepcopy(attention)
        assert names == set(again.state_dict()) == {
            "bias_table", "qkv.weight", "qkv.bias", "out_proj.weight", "out_proj.bias"
        }
        assert torch.equal(self.output(again), self.output(attention))
        torch.testing.assert_close(self.output(again), expected)
        self.check_is_fresh(again)


class TestCompiled:
    """torch.compile captures the whole network as one graph, at most twice for all batch sizes."""

    @pytest.mark.slow
    @pytest.mark.skipif(find_compiler("C++") is None, reason="needs a C++ compiler")
    def test_machine_code_agrees_with_eager(self):
        config = two_blocks()
        model, inputs = random_network(config), random_inputs(config)
        with torch.no_grad():
            expected = model(*inputs)
            torch.compiler.reset()
            compile_network(model)
            assert relative_error(model(*inputs), expected) <= 1e-5

    def test_a_missing_compiler_raises(self, monkeypatch):
        monkeypatch.setattr("shutil.which", lambda name: None)
        with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler and none was found"):
            compile_network(random_network(two_blocks()))

    @pytest.mark.parametrize("gradients", [False, True])
    def test_agrees_with_eager(self, gradients):
        config = two_blocks()
        model, graphs = random_network(config), []

        def compiler(graph, inputs):
            graphs.append(graph)
            return lookup_backend("aot_eager")(graph, inputs)

        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        with torch.set_grad_enabled(gradients):
            for batch in (2,) if gradients else (2, 3):
                inputs = random_inputs(config, batch=batch)
                expected, result = model(*inputs), compiled(*inputs)
                assert relative_error(result, expected.detach()) <= 1e-6
                if gradients:
                    weight = model.encoder[0].blocks["1"].branches["attention"].bias_table
                    ours, theirs = (torch.autograd.grad(y.square().sum(), weight)[0] for y in (result, expected))
                    assert relative_error(ours, theirs) <= 1e-5
        assert len(graphs) <= 2


class TestInitialisation:
    """Initial weights as in the official code, but the head's last Linear at zero."""

    def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity(self):
        config = small_config()
        torch.manual_seed(0)
        model = LaMambaUNet(config)
        x, t, y = random_inputs(config)
        assert not model(x, t, y).any()
        block = model.encoder[0].blocks["1"]
        tokens = torch.randn(2, 8, 8, 16)
        assert torch.equal(block(tokens, torch.randn(2, 64), model.geometries[0]), tokens)

    def test_distributions(self):
        torch.manual_seed(0)
        model = LaMambaUNet(small_config(width=64, num_heads=4, state_size=4))
        scan = model.encoder[0].blocks["0"].branches["scan"]
        assert torch.equal(scan.A_log[2, 5], torch.arange(1, 5).float().log())
        assert torch.equal(scan.D, torch.ones(4, 128))
        step = F.softplus(scan.b_dt)
        assert 0.00099 < float(step.min()) < 0.0012
        assert 0.08 < float(step.max()) < 0.1001
        assert abs(float(step.log().mean()) - math.log(0.01)) < 0.15           # log-uniform, so centred at 0.01
        for weight, bound in ((scan.W_dt, 4**-0.5), (scan.W_x, 128**-0.5), (scan.conv.weight, 1 / 3)):
            assert 0.95 * bound < float(weight.abs().max()) <= bound
        linear = model.encoder[0].blocks["0"].branches["mlp"].linear_in
        assert float(linear.weight.abs().max()) <= math.sqrt(6 / (64 + 256))
        assert not linear.bias.any()
        for weight in (model.label_embedding.weight, model.timestep_embedding.linear_in.weight):
            assert abs(float(weight.std()) - 0.02) < 0.003
        assert abs(float(model.encoder[0].blocks["0"].branches["attention"].bias_table.std()) - 0.02) < 0.005

    def test_positions_are_sines_and_cosines_of_column_then_row(self):
        table = position_table((3, 5), 16)
        frequency = 10000 ** (-1 / 4)
        assert table[2, 4, 1] == pytest.approx(math.sin(4 * frequency))
        assert table[2, 4, 4 + 1] == pytest.approx(math.cos(4 * frequency))
        assert table[2, 4, 8 + 1] == pytest.approx(math.sin(2 * frequency))
        assert table[2, 4, 12 + 1] == pytest.approx(math.cos(2 * frequency))

    def test_timestep_features_keep_their_precision_in_a_bfloat16_network(self):
        embedding = TimestepEmbedding(32).bfloat16()
        a, b = embedding(torch.tensor([998.0, 999.0]), torch.bfloat16)
        assert not torch.equal(a, b)


class TestRemovedBlocks:
    @torch.no_grad()
    def test_a_removed_block_is_an_identity(self):
        config = small_config(depths=(2, 2, 1, 1))
        full = random_network(config)
        for block in (full.encoder[0].blocks["1"], full.decoder[3].blocks["0"]):
            block.modulation.weight.zero_()
            block.modulation.bias.zero_()
        pruned = LaMambaUNet(config.replace(removed_blocks=("encoder.0.1", "decoder.3.0"))).eval()
        kept = {k: v for k, v in full.state_dict().items() if k in pruned.state_dict()}
        pruned.load_state_dict(kept)
        assert len(kept) < len(full.state_dict())
        inputs = random_inputs(config)
        assert torch.equal(full(*inputs), pruned(*inputs))

    @torch.no_grad()
    @pytest.mark.parametrize("branch", ["scan", "attention", "mlp"])
    def test_a_removed_branch_has_no_modulation(self, branch):
        config = small_config(removed_blocks=(f"decoder.3.1.{branch}",))
        model = random_network(config)
        assert model.decoder[3].blocks["1"].modulation.out_features == 6 * 16
        assert model(*random_inputs(config)).isfinite().all()

    @torch.no_grad()
    def test_a_removed_bottleneck_removes_its_residual(self):
        config = small_config()
        without = random_network(config.replace(removed_blocks=("bottleneck",)))
        empty = LaMambaUNet(config.replace(removed_blocks=("bottleneck.0",))).eval()
        empty.load_state_dict(without.state_dict())
        inputs = random_inputs(config)
        assert not torch.equal(without(*inputs), empty(*inputs))               # x against x + x


class TestInput:
    """Invalid input raises with what came and what fits."""

    @pytest.mark.parametrize(("change", "said"), [
        (dict(x=torch.zeros(2, 3, 8, 8)), r"x has shape \(2, 3, 8, 8\), the network reads \(b, 4, 8, 8\)"),
        (dict(x=torch.zeros(4, 8, 8)), "the network reads"),
        (dict(y=None), "pass class_labels"),
        (dict(y=torch.tensor([0, 4])), "class_labels run from 0 to 4; they must lie in 0 .. 3"),
        (dict(y=torch.tensor([0, -1])), "class_labels run from -1 to 0"),
        (dict(y=torch.tensor([0, 1, 2])), r"class_labels has shape \(3,\)"),
    ])
    def test_is_checked(self, change, said):
        model = LaMambaUNet(small_config())
        x, t, y = random_inputs(model.architecture)
        inputs = {"x": x, "t": t, "y": y} | change
        with pytest.raises(ValueError, match=said):
            model(inputs["x"], inputs["t"], inputs["y"])

    def test_an_unconditional_network_takes_no_labels(self):
        model = random_network(small_config(num_classes=0))
        x, t, _ = random_inputs(model.architecture)
        assert model(x, t).isfinite().all()
        with pytest.raises(ValueError, match="unconditional"):
            model(x, t, torch.tensor([0, 0]))

    @torch.no_grad()
    def test_one_timestep_for_all(self):
        model = random_network(small_config())
        x, _, y = random_inputs(model.architecture)
        assert torch.equal(model(x, 500, y), model(x, torch.tensor([500, 500]), y))


class TestSaving:
    def test_in_shards(self, tmp_path):
        model = random_network(small_config())
        model.save_pretrained(tmp_path, max_shard_size="200KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        inputs = random_inputs(model.architecture)
        assert torch.equal(LaMambaUNet.from_pretrained(tmp_path)(*inputs), model(*inputs))

    @pytest.mark.parametrize(("damage", "said"), [
        (lambda state: state.pop("head.linear.bias"), r"missing: head\.linear\.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda state: state.update({"head.linear.bias": torch.zeros(3)}), r"head\.linear\.bias"),
    ])
    def test_loading_is_strict_about_tensors(self, tmp_path, damage, said):
        random_network(small_config()).save_pretrained(tmp_path)
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        damage(state)
        save_file(state, file, {"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=said):
            LaMambaUNet.from_pretrained(tmp_path)

    @pytest.mark.parametrize("name", SHIPPED_MODELS)
    def test_the_packages_networks_are_known_by_name(self, name):
        network, expected = LaMambaUNet.from_pretrained(name), open_network(name)[0]
        for (key, weight), (other, its) in zip(
            network.state_dict().items(), expected.state_dict().items(), strict=True
        ):
            assert key == other
            assert torch.equal(weight, its)

    def test_loading_is_strict_about_the_config(self, tmp_path):
        random_network(small_config()).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "windowsize": 4}))
        with pytest.raises(ValueError, match="did you mean 'window_size'"):
            LaMambaUNet.from_pretrained(tmp_path)

    @pytest.mark.parametrize("shards", [{}, dict(max_shard_size="200KB")])
    def test_a_hub_id_is_checked_before_anything_is_allocated(self, tmp_path, shards):
        """A cache as huggingface_hub lays it out, with what was fetched before."""
        repository, revision = tmp_path / "models--somebody--small", "0123456789" * 4
        folder = repository / "snapshots" / revision
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(revision)
        model = random_network(small_config())
        model.save_pretrained(folder, **shards)
        where = dict(cache_dir=tmp_path, local_files_only=True)
        inputs = random_inputs(model.architecture)
        assert torch.equal(LaMambaUNet.from_pretrained("somebody/small", **where)(*inputs), model(*inputs))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "width": 32 * 10**5}))
        with pytest.raises(ValueError, match=f"{revision}.*position_embedding has shape"):
            LaMambaUNet.from_pretrained("somebody/small", **where)
        with pytest.raises(OSError, match="somebody/other"):
            LaMambaUNet.from_pretrained("somebody/other", **where)
