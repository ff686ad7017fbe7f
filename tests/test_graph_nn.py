"""Graph convolution, sparse attention, the two streams and the loss, against oracles."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scpert.module._graph_models import CellStream, KnowledgeStream, autofocus_loss, direction_loss
from scpert.module._graph_prior import GraphPrior
from scpert.nn._graph import EdgeAttention, GraphConv, net_matrix, normalised_adjacency


def _random_graph(n: int, density: float, seed: int) -> sparse.csr_matrix:
    m = sparse.random(n, n, density, random_state=seed, format="csr")
    m.setdiag(0)
    m.eliminate_zeros()
    return m


def test_net_matrix_by_name():
    net = pd.DataFrame({"source": ["B", "A", "Z"], "target": ["A", "C", "A"], "weight": [2.0, 3.0, 9.0]})
    m = net_matrix(net, ["A", "B", "C"])
    assert m.nnz == 2
    assert m[1, 0] == 2.0
    assert m[0, 2] == 3.0
    assert (
        net_matrix(net, ["A", "B", "C"], symmetric=True) - net_matrix(net, ["A", "B", "C"], symmetric=True).T
    ).nnz == 0


def test_graph_conv_is_pyg_sgconv():
    pyg = pytest.importorskip("torch_geometric.nn")
    m = _random_graph(40, 0.1, 0)
    conv = GraphConv(normalised_adjacency(m), 6, 3)
    ref = pyg.SGConv(6, 3, K=1)
    ref.lin.load_state_dict(conv.linear.state_dict())
    coo = m.tocoo()
    edges = torch.as_tensor(np.stack([coo.row, coo.col]).astype(np.int64))
    x = torch.randn(40, 6)
    expected = ref(x, edges, torch.as_tensor(coo.data, dtype=torch.float32))
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)
    rows = torch.tensor([3, 3, 17, 0])
    torch.testing.assert_close(conv(x, rows), expected[rows], atol=1e-5, rtol=1e-5)


def test_isolated_node_keeps_itself():
    conv = GraphConv(normalised_adjacency(sparse.csr_matrix((3, 3))), 2, 2)
    x = torch.randn(3, 2)
    torch.testing.assert_close(conv.propagate(x), x)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_edge_attention_is_dense_masked_attention(heads):
    n, width = 30, 16
    m = _random_graph(n, 0.1, heads)  # not symmetric: rows look, columns are seen
    layer = EdgeAttention(m, width, heads).double()
    x = torch.randn(3, n, width, dtype=torch.double, requires_grad=True)
    allowed = torch.as_tensor((m.toarray() != 0) | np.eye(n, dtype=bool))

    def dense(x):
        q, k, v = layer.qkv(x).view(3, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        score = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).masked_fill(~allowed, -torch.inf)
        return layer.out((score.softmax(-1) @ v).transpose(1, 2).reshape(3, n, width))

    torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)
    leaves = [x, *layer.parameters()]
    ours, theirs = (
        torch.autograd.grad((layer(x) ** 3).sum(), leaves),
        torch.autograd.grad((dense(x) ** 3).sum(), leaves),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)
    _, weights = layer(x, return_weights=True)
    sums = np.add.reduceat(weights[0, 0].detach().numpy(), layer.indptr[:-1].numpy())
    np.testing.assert_allclose(sums, 1.0)


def test_attention_without_a_mask_is_the_same_either_way():
    layer = EdgeAttention(sparse.csr_matrix(np.ones((6, 6))), 8, 2)
    x = torch.randn(2, 6, 8)
    assert layer.dense
    torch.testing.assert_close(layer(x), layer(x, return_weights=True)[0])


def test_attention_survives_large_scores_and_bad_heads():
    layer = EdgeAttention(sparse.csr_matrix((4, 4)), 4, 2)
    assert torch.isfinite(layer(1e4 * torch.randn(1, 4, 4))).all()
    with pytest.raises(ValueError, match="divisor"):
        EdgeAttention(sparse.csr_matrix((4, 4)), 4, 3)


def _stream(mask: bool = True, chunk: int = 8, n_genes: int = 20, seed: int = 0) -> KnowledgeStream:
    torch.manual_seed(seed)
    return KnowledgeStream(
        normalised_adjacency(_random_graph(n_genes, 0.2, 1)),
        {"a": normalised_adjacency(_random_graph(7, 0.3, 2)), "b": normalised_adjacency(_random_graph(7, 0.3, 3))},
        _random_graph(n_genes, 0.2, 4) if mask else None,
        n_hidden=8,
        n_heads=2,
        n_feedforward=16,
        chunk=chunk,
    )


@pytest.mark.parametrize("mask", [True, False])
def test_stream_control_is_zero_order_is_nothing_chunks_agree(mask):
    stream = _stream(mask)
    codes = torch.tensor([[-1, -1], [0, 3], [3, 0], [5, -1], [-1, 5]])
    shift = stream(codes)
    assert (shift[0] == 0).all()
    torch.testing.assert_close(shift[1], shift[2])
    torch.testing.assert_close(shift[3], shift[4])
    assert not torch.allclose(shift[1], shift[3])
    small = _stream(mask, chunk=2)
    small.load_state_dict(stream.state_dict())
    torch.testing.assert_close(small(codes), shift)
    a = torch.autograd.grad((shift**2).sum(), list(stream.parameters()))
    b = torch.autograd.grad((small(codes) ** 2).sum(), list(small.parameters()))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", [True, False])
def test_permuting_genes_permutes_shifts(mask):
    stream = _stream(mask)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    p = order.numpy()
    torch.manual_seed(5)
    other = KnowledgeStream(
        normalised_adjacency(_random_graph(20, 0.2, 1)[p][:, p]),
        {"a": normalised_adjacency(_random_graph(7, 0.3, 2)), "b": normalised_adjacency(_random_graph(7, 0.3, 3))},
        _random_graph(20, 0.2, 4)[p][:, p] if mask else None,
        n_hidden=8,
        n_heads=2,
        n_feedforward=16,
    )
    axis = dict(stream.gene_rows())
    state = {k: v.index_select(axis[k], order) if k in axis else v for k, v in stream.named_parameters()}
    with torch.no_grad():
        for k, v in other.named_parameters():
            v.copy_(state[k])
    codes = torch.tensor([[0, 3], [5, -1]])
    torch.testing.assert_close(other(codes), stream(codes)[:, order], atol=1e-5, rtol=1e-4)


def test_unseen_target_feels_its_neighbours():
    graph = sparse.csr_matrix((np.ones(2), ([0, 1], [1, 0])), shape=(3, 3))
    stream = KnowledgeStream(
        normalised_adjacency(sparse.csr_matrix((5, 5))), {"g": normalised_adjacency(graph)}, n_hidden=4
    )
    before = stream(torch.tensor([[0], [2]])).detach()
    with torch.no_grad():
        stream.target_table[1] += 3.0
    after = stream(torch.tensor([[0], [2]])).detach()
    assert not torch.allclose(before[0], after[0])  # 1 is a neighbour of 0 ...
    torch.testing.assert_close(before[1], after[1])  # ... and not of 2


def test_losses_by_numpy():
    rng = np.random.default_rng(0)
    x, y, c = rng.normal(size=(7, 4)), rng.normal(size=(7, 4)), rng.normal(size=4)
    group = np.array([0, 0, 0, 1, 1, 2, 0])
    t = [torch.as_tensor(v) for v in (y, x, group)]
    for exponent in (2.0, 3.0, 4.0):
        expected = np.mean([(np.abs(x - y) ** exponent)[group == k].mean() for k in range(3)])
        np.testing.assert_allclose(float(autofocus_loss(*t, 3, exponent=exponent)), expected)
    expected = np.mean([((np.tanh((x - c) / 0.1) - np.tanh((y - c) / 0.1)) ** 2)[group == k].mean() for k in range(3)])
    got = direction_loss(t[0], t[1], torch.as_tensor(c), t[2], 3, temperature=0.1)
    np.testing.assert_allclose(float(got), expected)


def test_direction_has_a_gradient_and_the_sign_as_limit():
    observed, control = torch.tensor([[1.0, -1.0]]), torch.zeros(2)
    predicted = torch.tensor([[-0.05, -0.5]], requires_grad=True)
    group = torch.zeros(1, dtype=torch.long)
    loss = direction_loss(predicted, observed, control, group, 1, temperature=0.1)
    assert torch.autograd.grad(loss, predicted)[0][0, 0] < 0  # wrong side: push it up
    limit = direction_loss(predicted.detach(), observed, control, group, 1, temperature=1e-6)
    np.testing.assert_allclose(float(limit), ((np.sign([1, -1]) - np.sign([-0.05, -0.5])) ** 2).mean())


def test_cell_stream_kl_and_zeros():
    torch.manual_seed(0)
    stream = CellStream(12, n_latent=3, hidden=(8, 4))
    x = torch.rand(5, 12) * (torch.rand(5, 12) > 0.5)
    out = stream(x, torch.randn(5, 3))
    assert (out["x_hat"][x == 0] == 0).all()
    assert (out["x_hat"][x > 0] > 0).all()
    mean, log_variance = stream.encode(x)
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(out["kl"], expected)
    assert (CellStream(12, output="linear").decode(torch.randn(5, 16), torch.ones(5, 12)) < 0).any()


def test_prior_leave_one_out_by_refitting():
    rng = np.random.default_rng(0)
    graph = {"g": normalised_adjacency(_random_graph(9, 0.3, 0))}
    sets = [[i] for i in range(7)] + [[0, 1], [2, 8]]
    delta, noise = rng.normal(size=(9, 5)), rng.uniform(0.1, 0.2, 9)
    prior = GraphPrior(graph).fit(sets, delta, noise)
    for left in (0, 7):
        keep = [i for i in range(9) if i != left]
        K = prior._covariance(prior.design, prior.design)
        alpha = np.linalg.solve(K[np.ix_(keep, keep)] + np.diag(prior.noise[keep]), delta[keep])
        np.testing.assert_allclose(prior.loo[left], K[left, keep] @ alpha, atol=1e-8)
    np.testing.assert_allclose(prior.shares(sets).sum(axis=1), 1.0)
    K = prior._covariance(prior.design, prior.design)
    np.testing.assert_allclose(prior._variance(prior.design), np.diag(K))
    expected = np.diag(K - K @ np.linalg.solve(K + np.diag(prior.noise), K))
    np.testing.assert_allclose(prior.predict(sets)[1], expected, atol=1e-8)


def test_prior_shrinks_genes_by_their_noise():
    rng = np.random.default_rng(0)
    graph = {"g": normalised_adjacency(_random_graph(9, 0.3, 0))}
    sets, delta, noise = [[i] for i in range(9)], rng.normal(size=(9, 3)) * [1.0, 1.0, 0.1], np.full(9, 0.1)
    gene_noise = np.tile([0.01, 0.3, 0.01], (9, 1))
    prior = GraphPrior(graph).fit(sets, delta, noise, gene_noise=gene_noise)
    ratio = prior.ratio
    K = prior._covariance(prior.design, prior.design)
    for g in range(3):
        A = np.linalg.inv(K + ratio[g] * np.diag(prior.noise))
        np.testing.assert_allclose(prior.alpha[:, g], A @ delta[:, g], atol=1e-8)
        np.testing.assert_allclose(prior.loo[:, g], delta[:, g] - A @ delta[:, g] / np.diag(A), atol=1e-8)
    assert ratio[1] > ratio[0]
    # a perturbation of one cell, nearly all noise, does not change what is known of the genes
    wild = np.vstack([delta, [50.0, -50.0, 80.0]])
    wild_noise = np.vstack([gene_noise, [2000.0, 3000.0, 5000.0]])
    with_wild = GraphPrior(graph).fit([*sets, [8]], wild, np.append(noise, 3000.0), gene_noise=wild_noise)
    np.testing.assert_allclose(with_wild.ratio, ratio)


def test_genes_that_are_noise_do_not_hide_what_the_others_tell():
    """A table with a third of the genes at sixteen times the error of the others: these are predicted as without them."""
    rng = np.random.default_rng(0)
    module = np.repeat(np.arange(8), 5)
    true = rng.normal(0, 0.5, (8, 60))[module] + rng.normal(0, 0.2, (40, 60))
    graph = {
        "g": normalised_adjacency(sparse.csr_matrix((module[:, None] == module) & ~np.eye(40, dtype=bool), dtype=float))
    }
    train, test = np.flatnonzero(np.arange(40) % 5), np.arange(0, 40, 5)
    delta, noise = true[train] + rng.normal(0, 0.3, (32, 60)), np.full((32, 60), 0.09)
    loud, loud_noise = np.hstack([delta, rng.normal(0, 5, (32, 30))]), np.hstack([noise, np.full((32, 30), 25.0)])
    error = []
    for d, n, reliable in ((delta, noise, True), (loud, loud_noise, True), (loud, loud_noise, False)):
        prior = GraphPrior(graph).fit([[i] for i in train], d, n.mean(axis=1), gene_noise=n, by_reliability=reliable)
        error.append(np.mean((prior.predict([[i] for i in test])[0][:, :60] - true[test]) ** 2))
    assert error[1] < 1.02 * error[0] < 0.6 * np.mean(true[test] ** 2)
    assert error[2] > 1.5 * error[0]
    idle = rng.normal(0, 0.3, delta.shape)
    nothing = GraphPrior(graph).fit(
        [[i] for i in train], idle, noise.mean(axis=1), gene_noise=noise, by_reliability=True
    )
    assert np.mean(nothing.predict([[i] for i in test])[0] ** 2) < 0.1 * 0.09


def test_prior_gradient_and_limits():
    """The strengths follow the data: a graph that carries effects is used, additivity is found, noise is not."""
    rng = np.random.default_rng(1)
    n, genes = 60, 50
    block = np.repeat(np.arange(12), 5)
    graph = sparse.csr_matrix((block[:, None] == block[None, :]).astype(float) - np.eye(n))
    adjacency = {"g": normalised_adjacency(graph)}
    centre = rng.normal(size=(12, genes))
    related = centre[block] + 0.2 * rng.normal(size=(n, genes))
    unrelated = rng.normal(size=(n, genes))
    train = [i for i in range(n) if i % 5]
    test = [i for i in range(n) if i % 5 == 0]
    sets = [[i] for i in train]
    small = np.full(len(train), 1e-3)
    helped = GraphPrior(adjacency).fit(sets, related[train], small).predict([[i] for i in test])[0]
    assert np.mean((helped - related[test]) ** 2) < 0.2 * np.mean(related[test] ** 2)
    idle = GraphPrior(adjacency).fit(sets, unrelated[train], small).predict([[i] for i in test])[0]
    mean = unrelated[train].mean(0)
    assert np.mean((idle - unrelated[test]) ** 2) < 1.1 * np.mean((mean - unrelated[test]) ** 2)
    pairs = [[i, i + 1] for i in range(0, 40, 4)]
    both = np.stack([unrelated[a] + unrelated[b] for a, b in pairs])
    everything = [[i] for i in range(n)] + pairs[:-2]
    prior = GraphPrior(adjacency).fit(everything, np.vstack([unrelated, both[:-2]]), np.full(len(everything), 1e-3))
    added = prior.predict(pairs[-2:])[0]
    assert np.mean((added - both[-2:]) ** 2) < 0.1 * np.mean(both[-2:] ** 2)
