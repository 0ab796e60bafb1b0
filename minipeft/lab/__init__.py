"""What the notebooks share: models, tasks, the training loop, figures. No method lives here."""

import warnings

# transformers asks for a notebook widget at import; the plain bar does without.
warnings.filterwarnings("ignore", message="IProgress not found")
