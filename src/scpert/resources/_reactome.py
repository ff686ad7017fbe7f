"""Reactome: pathways of genes, genes of pathways, and the hierarchy between pathways."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, overload

import pandas as pd

from .. import _keys as K
from .._checks import check_whole, listing, suggest
from ..errors import FileFormatError, MissingKeyError, ScpertError
from ._fetch import fetch
from ._read import check_acyclic, column, local_file, open_text, provenance, read_gmt, read_table
from ._symbols import rename_genes

__all__ = ["Reactome", "reactome"]

logger = logging.getLogger("scpert")

_URL = "https://reactome.org/download/current/"
_FILES = {
    "path": "ReactomePathways.gmt.zip",
    "names": "ReactomePathways.txt",
    "hierarchy": "ReactomePathwaysRelation.txt",
}
_STABLE_ID = re.compile(r"^R-[A-Z]{3}-\d+(\.\d+)?$")
_SPECIES = {"human": "HSA", "mouse": "MMU", "rat": "RNO", "yeast": "SCE", "zebrafish": "DRE", "fly": "DME"}
LICENCE = "Reactome: CC0 1.0"


class Reactome:
    """Pathways, their genes and their hierarchy (a directed acyclic graph).

    Levels count from below: a pathway without sub-pathways has level 1 (L1), any other the highest level of its
    sub-pathways plus one, so that a parent is always above its children and the top of a branch is its highest level.

    Parameters
    ----------
    gene_sets
        Genes by pathway identifier.
    names
        Names by pathway identifier.
    hierarchy
        Pairs ``(parent, child)`` of identifiers.

    Attributes
    ----------
    attrs
        ``source``, ``date``, ``licence``, ``sha256`` of the files, and what did not fit together.

    Raises
    ------
    FileFormatError
        If the hierarchy has a cycle.

    Examples
    --------
    >>> from scpert.resources import Reactome
    >>> r = Reactome({"P": ["A", "B", "C"], "Q": ["A", "B"]}, {"P": "all", "Q": "some"}, [("P", "Q")])
    >>> r.pathways("A"), r.pathways("A", level=1), r.genes("some"), r.parents("Q")
    (['P', 'Q'], ['Q'], ['A', 'B'], ['P'])
    """

    def __init__(
        self,
        gene_sets: Mapping[str, Iterable[str]],
        names: Mapping[str, str] | None = None,
        hierarchy: Iterable[tuple[str, str]] = (),
    ):
        self._genes = {str(p): tuple(sorted(set(map(str, genes)))) for p, genes in gene_sets.items()}
        if not any(self._genes.values()):
            raise ScpertError("The gene sets hold no gene.")
        self.names = {**{p: p for p in self._genes}, **{str(k): str(v) for k, v in (names or {}).items()}}
        self._parents: dict[str, set[str]] = {}
        self._children: dict[str, set[str]] = {}
        for parent, child in hierarchy:
            self._parents.setdefault(str(child), set()).add(str(parent))
            self._children.setdefault(str(parent), set()).add(str(child))
        order = check_acyclic(self._parents, "of Reactome")  # parents first
        self._level = dict.fromkeys({*self._genes, *self.names}, 1)
        for pathway in reversed(order):
            self._level[pathway] = 1 + max((self._level[c] for c in self._children.get(pathway, ())), default=0)
        for pathway in self._level:
            self.names.setdefault(pathway, pathway)
        by_gene: dict[str, list[str]] = {}
        for pathway in sorted(self._genes):
            for gene in self._genes[pathway]:
                by_gene.setdefault(gene, []).append(pathway)
        self._pathways = by_gene
        self._by_name: dict[str, list[str]] = {}
        for pathway, name in self.names.items():
            self._by_name.setdefault(name, []).append(pathway)
        self.attrs: dict[str, Any] = {}

    def __repr__(self) -> str:
        return (
            f"Reactome with {len(self._level):,} pathways on {self.n_levels} levels, {len(self._pathways):,} genes, "
            f"{sum(map(len, self._children.values())):,} parent-child pairs"
        )

    def __contains__(self, gene: object) -> bool:
        return gene in self._pathways

    @property
    def all_genes(self) -> list[str]:
        """Every gene that is in a pathway, sorted."""
        return sorted(self._pathways)

    @property
    def all_pathways(self) -> list[str]:
        """Identifiers of every pathway, sorted."""
        return sorted(self._level)

    @property
    def n_levels(self) -> int:
        """The highest level."""
        return max(self._level.values())

    def _id(self, pathway: str) -> str:
        if pathway in self._level:
            return pathway
        hits = self._by_name.get(pathway, [])
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise MissingKeyError(f"The name {pathway!r} stands for {len(hits)} pathways: name one of {listing(hits)}.")
        near = suggest(pathway, [*self._level, *self._by_name])
        hint = f" Did you mean {listing(near)}?" if near else ""
        raise MissingKeyError(f"Reactome holds no pathway {pathway!r}, neither as identifier nor as name.{hint}")

    def level(self, pathway: str) -> int:
        """Level of a pathway: 1 without sub-pathways, else one above its highest sub-pathway."""
        return self._level[self._id(pathway)]

    def levels(self, pathway: str) -> dict[int, list[str]]:
        """A pathway and everything above it, by level: from its own level to the top.

        Returns
        -------
        Sorted identifiers by level; the lowest key is the level of the pathway itself.
        """
        out: dict[int, list[str]] = {}
        for p in sorted(self.ancestors(pathway) | {self._id(pathway)}):
            out.setdefault(self._level[p], []).append(p)
        return dict(sorted(out.items()))

    def parents(self, pathway: str) -> list[str]:
        """Pathways that hold this one directly, sorted."""
        return sorted(self._parents.get(self._id(pathway), ()))

    def children(self, pathway: str) -> list[str]:
        """Direct sub-pathways, sorted."""
        return sorted(self._children.get(self._id(pathway), ()))

    def ancestors(self, pathway: str) -> set[str]:
        """Every pathway above this one."""
        return _reach(self._id(pathway), self._parents)

    def descendants(self, pathway: str) -> set[str]:
        """Every pathway below this one."""
        return _reach(self._id(pathway), self._children)

    @overload
    def pathways(self, gene: str, level: int | None = None) -> list[str]: ...  # type: ignore[overload-overlap]
    @overload
    def pathways(self, gene: Iterable[str], level: int | None = None) -> dict[str, list[str]]: ...
    def pathways(self, gene: str | Iterable[str], level: int | None = None) -> list[str] | dict[str, list[str]]:
        """Pathways of a gene, or of each gene of a list.

        Parameters
        ----------
        gene
            A gene, or several.
        level
            Only pathways of this level (1 is the lowest); ``None``: of all levels.

        Returns
        -------
        Sorted identifiers for one gene (empty if Reactome does not hold it: ask with ``gene in reactome``); for
        several, these by gene.
        """
        if level is not None and not 1 <= check_whole("level", level) <= self.n_levels:
            raise ScpertError(f"level={level!r}: the levels are 1 (lowest) to {self.n_levels}.")
        if not isinstance(gene, str):
            return {str(g): self.pathways(str(g), level) for g in gene}
        found = self._pathways.get(gene, [])
        return [p for p in found if level is None or self._level[p] == level]

    def genes(self, pathway: str) -> list[str]:
        """Genes of a pathway (identifier or name), sorted; as the gene sets say, those of sub-pathways included."""
        return list(self._genes.get(self._id(pathway), ()))

    def table(self, genes: Iterable[str] | None = None) -> pd.DataFrame:
        """All pathways of genes at every level: ``gene``, ``pathway``, ``name``, ``level``, lowest level first."""
        chosen = self.all_genes if genes is None else [g for g in dict.fromkeys(map(str, genes)) if g in self._pathways]
        rows = [(g, p, self.names[p], self._level[p]) for g in chosen for p in self._pathways[g]]
        out = pd.DataFrame(rows, columns=["gene", "pathway", "name", "level"])
        return out.sort_values(["gene", "level", "pathway"], ignore_index=True)

    def to_annotations(self, level: int | None = None) -> pd.DataFrame:
        """Annotations ``gene``, ``term`` (pathway), for :func:`scpert.pp.similarity_net`."""
        out = self.table()
        out = out if level is None else out[out["level"] == level]
        return out[["gene", "pathway"]].rename(columns={"pathway": "term"}).reset_index(drop=True)

    def to_net(self, level: int | None = None) -> pd.DataFrame:
        """Net with the pathways as ``source`` and their genes as ``target``, weight 1 (decoupler's form)."""
        out = self.to_annotations(level).rename(columns={"term": K.SOURCE, "gene": K.TARGET})
        out = out.assign(**{K.WEIGHT: 1.0})[list(K.NET)]
        out.attrs.update(self.attrs)
        return out

    def hierarchy_net(self) -> pd.DataFrame:
        """Net with the parents as ``source`` and their sub-pathways as ``target``, weight 1."""
        rows = [(p, c, 1.0) for p in sorted(self._children) for c in sorted(self._children[p])]
        return pd.DataFrame(rows, columns=list(K.NET))


def _reach(start: str, step: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    front = [start]
    while front:
        for node in step.get(front.pop(), ()):
            if node not in found:
                found.add(node)
                front.append(node)
    return found


def _read_pairs(path: Any, argument: str, columns: tuple[list[str], list[str]]) -> list[tuple[str, str]]:
    """Two columns of a file with or without a header (Reactome's own files have none)."""
    with open_text(path) as lines:
        first = next((line for line in lines if line.strip()), "")
    fields = [f.strip() for f in first.rstrip("\n").split("\t")]
    if _STABLE_ID.match(fields[0]):
        pairs = []
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    f = [x.strip() for x in line.rstrip("\n").split("\t")]
                    if len(f) < 2 or not f[1]:
                        raise FileFormatError(
                            f"{argument} {path}: line {number} has one column. Is the file truncated?"
                        )
                    pairs.append((f[0], f[1]))
        return pairs
    table = read_table(path)
    a, b = (column(table, names, names[0], path) for names in columns)
    return list(zip(table[a], table[b], strict=True))


def reactome(
    path: str | PathLike | Sequence[str | PathLike] | None = None,
    names: str | PathLike | None = None,
    hierarchy: str | PathLike | None = None,
    *,
    organism: str = "human",
    aliases: str | PathLike | pd.DataFrame | None = None,
) -> Reactome:
    r"""Read Reactome's three files.

    Parameters
    ----------
    path
        Gene sets as GMT: ``name TAB identifier TAB genes`` (Reactome's own) or ``identifier TAB name TAB genes``. Or all
        three files at once: ``(gene sets, names, hierarchy)``.
    names
        ``ReactomePathways.txt`` (identifier, name, species), or a table with ``pathway_id`` and ``name``. May be left
        out with a local ``path``: the gene sets have names too.
    hierarchy
        ``ReactomePathwaysRelation.txt`` (parent, child), or a table with these columns. Without it (a local ``path``
        alone) every pathway is on level 1. Where none of the three is given, the official ones are downloaded once into the cache.
    organism
        ``human``, ``mouse``, ``rat``, ``yeast``, ``zebrafish``, ``fly``, or the three letters in Reactome's identifiers
        (``"GGA"`` for chicken): lines of other species in names and hierarchy are left out. The official gene sets are
        human; for any other organism give your own ``path``.
    aliases
        See :func:`map_symbols`.

    Returns
    -------
    :class:`Reactome`; ``.attrs`` has ``source``, ``date``, ``licence``, ``sha256`` by file, and
    ``not_in_hierarchy``: gene sets that the hierarchy does not place; ``without_genes``: pathways of the hierarchy that
    have no gene set.

    Raises
    ------
    FileFormatError
        If a file is truncated or has another format, if the hierarchy has a cycle, or if the three do not belong
        together (no pathway in common).

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from scpert.resources import reactome
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "r.gmt").write_text("All\tR-HSA-1\tA\tB\nSome of it\tR-HSA-2\tA\n")
    >>> _ = (folder / "h.txt").write_text("R-HSA-1\tR-HSA-2\n")
    >>> reactome(folder / "r.gmt", hierarchy=folder / "h.txt").levels("Some of it")
    {1: ['R-HSA-2'], 2: ['R-HSA-1']}
    """
    code = _SPECIES.get(organism, organism)
    if not re.fullmatch("[A-Z]{3}", str(code)):
        raise ScpertError(
            f"organism={organism!r} is not known. Choose one of {listing(_SPECIES)}, or give the three letters of its "
            "identifiers (R-GGA-...: 'GGA')."
        )
    prefix = f"R-{code}-"
    if isinstance(path, (list, tuple)):
        if len(path) != 3 or names is not None or hierarchy is not None:
            raise ScpertError(
                f"path has {len(path)} files: give three (gene sets, names, hierarchy) and no names= or hierarchy= beside."
            )
        path, names, hierarchy = path
    if path is None:
        if names is not None or hierarchy is not None:
            raise ScpertError(
                "Give the gene sets as path= too, or none of the three files to download the official ones."
            )
        if code != "HSA":
            raise ScpertError(
                f"Reactome's official gene sets are human. For {organism} pass your own files (path=, ...)."
            )
        files = {k: fetch(_URL + f, f, subfolder="resources") for k, f in _FILES.items()}
    else:
        given = {"path": path, "names": names, "hierarchy": hierarchy}
        if hierarchy is None:
            logger.warning(
                "reactome: no hierarchy= (ReactomePathwaysRelation.txt) was given: all pathways are on level 1, without "
                "parents and children"
            )
        files = {k: local_file(v, k) for k, v in given.items() if v is not None}
    sets: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    for first, second, genes in read_gmt(files["path"]):
        if genes and genes[0].startswith(("http://", "https://")):
            raise FileFormatError(
                f"{files['path']} lists a pathway for each protein or gene identifier (such as UniProt2Reactome.txt), with addresses "
                "where a GMT file has genes. Give Reactome's gene sets, ReactomePathways.gmt."
            )
        pathway, name = (first, second) if _STABLE_ID.match(first) else (second, first)
        if not _STABLE_ID.match(pathway):
            raise FileFormatError(
                f"{files['path']}: the set {first!r} has no Reactome identifier (such as R-HSA-109581) in its first or "
                "second column."
            )
        sets.setdefault(pathway, []).extend(genes)
        labels[pathway] = name
    flat = pd.DataFrame([(p, g) for p, gs in sets.items() for g in gs], columns=["pathway", "gene"])
    flat, report = rename_genes(flat, ["gene"], aliases, "Reactome")
    sets = {str(p): sorted(set(g)) for p, g in flat.groupby("pathway")["gene"]}
    if "names" in files:
        pairs = _read_pairs(files["names"], "names", (["pathway_id", "id", "pathway"], ["name", "pathway_name"]))
        labels.update((i, n) for i, n in pairs if i.startswith(prefix))
    edges: list[tuple[str, str]] = []
    if "hierarchy" in files:
        edges = _read_pairs(files["hierarchy"], "hierarchy", (["parent", "source"], ["child", "target"]))
        edges = [(p, c) for p, c in edges if p.startswith(prefix) and c.startswith(prefix)]
    placed = {x for edge in edges for x in edge}
    if "hierarchy" in files and not placed & set(sets):
        raise FileFormatError(
            f"The hierarchy {files['hierarchy']} places none of the pathways of {files['path']} (such as "
            f"{listing(sorted(sets), 3)}). Are both of organism={organism!r}?"
        )
    empty = sorted(placed - set(sets))
    if len(empty) > 0.1 * len(placed):
        logger.warning(
            "reactome: %d of the %d pathways of the hierarchy have no genes in %s: is it cut off, or of another release?",
            len(empty),
            len(placed),
            files["path"],
        )
    out = Reactome(sets, labels, edges)
    records = {k: provenance(f, LICENCE) for k, f in files.items()}
    out.attrs = {
        "source": records["path"]["source"],
        "date": records["path"]["date"],
        "licence": LICENCE,
        "sha256": records["path"]["sha256"],
        "files": records,
        "organism": organism,
        "not_in_hierarchy": sorted(set(sets) - placed),
        "without_genes": empty,
        **report,
    }
    return out
