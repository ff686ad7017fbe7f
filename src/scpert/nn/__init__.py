"""Building blocks of networks: torch only, no AnnData."""
