"""Every AnnData key and batch key of scpert: the only place with such strings."""

# obs
PERTURBATION = "perturbation"
CONTROL = "control"
SPLIT = "split"
SPLIT_GROUP = "split_group"
MATCHED_CONTROL = "matched_control"
QUALITY_FAIL = "quality_fail"
N_CELLS = "n_cells"
STATUS = "status"
IS_CONTROL = "is_control"

# values of obs["split"]
TRAIN = "train"
VAL = "val"
TEST = "test"

# layers
COUNTS = "counts"
DELTA = "delta"
STD = "std"
LOWER = "lower"
UPPER = "upper"
STD_ERROR = "std_error"
ZSCORE = "zscore"
PVALS = "pvals"
PVALS_ADJ = "pvals_adj"

# varp / uns
GRN = "grn"
TRUTH = "truth"
INTERACTIONS = "genetic_interactions"
UNS = "scpert"

# columns of a net (decoupler's form)
SOURCE = "source"
TARGET = "target"
WEIGHT = "weight"
NET = (SOURCE, TARGET, WEIGHT)

# values of the `scale` argument
SCALE_COUNTS = "counts"
SCALE_LOG1P = "log1p"
SCALE_EFFECTS = "effects"
SCALE_AUTO = "auto"
SCALES = (SCALE_COUNTS, SCALE_LOG1P, SCALE_EFFECTS)

# values of obs["status"] of a prediction
TRAINED = "trained"
COMBINATION = "combination"
UNSEEN = "unseen"
FALLBACK = "fallback"

#: Counts are brought to this total per cell before ``log1p``.
TARGET_SUM = 1e4
