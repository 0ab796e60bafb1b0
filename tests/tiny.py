"""Four tiny random models, one of each kind the methods must serve, and a batch for each."""

import torch
import transformers as tf

ARCHS = ("llama", "gpt2", "bert", "t5")
SIZE = dict(
    llama=tf.LlamaConfig(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0),
    gpt2=tf.GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
                       bos_token_id=1, eos_token_id=2),
    bert=tf.BertConfig(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                       num_attention_heads=4, max_position_embeddings=64, num_labels=3),
    t5=tf.T5Config(vocab_size=64, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4,
                   decoder_start_token_id=0),
)
CLASS = dict(llama=tf.LlamaForCausalLM, gpt2=tf.GPT2LMHeadModel,
             bert=tf.BertForSequenceClassification, t5=tf.T5ForConditionalGeneration)
# Linear layers, non-square ones among them, by their own names or the ends of their paths.
LINEAR = dict(llama=("q_proj", "v_proj", "down_proj"), gpt2=("c_attn", "mlp.c_proj"),
              bert=("query", "value", "output.dense"), t5=("q", "v", "wo"))


def build(arch: str, dtype=torch.float64, seed: int = 0, **changes):
    """The same weights for the same seed, dropout off. Biases and gains are moved off 0 and 1."""
    torch.manual_seed(seed)
    config = SIZE[arch].__class__(**{**SIZE[arch].to_dict(), **changes})
    model = CLASS[arch](config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(arch: str, rows: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    """Token ids with a mask that pads the last row (on the right), and labels."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    if arch == "bert":
        labels = torch.randint(0, 3, (rows,), generator=g)
    elif arch == "t5":
        labels = torch.randint(3, 64, (rows, 5), generator=g)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


@torch.no_grad()  # with gradients on, sdpa may take another kernel that differs in the last bit
def logits(model, inputs) -> torch.Tensor:
    """Logits of the real tokens only: what stands at padding is nobody's promise."""
    out = model(**inputs).logits
    labels = inputs["labels"]
    return out if labels.dim() == 1 else out[labels != -100]


def perturb(model, scale: float = 0.3, seed: int = 2) -> None:
    """Moves everything that trains away from where it started."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.add_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))


def fit(method, model, inputs, steps: int = 4, lr: float = 0.02) -> None:
    """A few AdamW steps with weight decay on, calling the verbs a loop calls."""
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    for step in range(steps):
        opt.zero_grad()
        loss = model(**inputs).loss
        if hasattr(method, "penalty"):
            loss = loss + method.penalty(model)
        loss.backward()
        opt.step()
        if hasattr(method, "advance"):
            method.advance(model, step)
