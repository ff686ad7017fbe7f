"""Knowledge about genes: annotations, pathways, regulons, interactomes; from local files or official sources."""

from ._knowledge import gene_ontology, interactome, regulons
from ._reactome import Reactome, reactome
from ._symbols import map_symbols
from ._words import term_words

__all__ = ["Reactome", "gene_ontology", "interactome", "map_symbols", "reactome", "regulons", "term_words"]
