"""The sizes of the tiny models that most tests use, and the captions that their tokenizer is trained on."""

VOCAB_SIZE = 99
IMAGE_SIZE = 32
PATCH_SIZE = 8
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CAPTIONS = [
    "a red circle above a small blue square",
    "two green triangles beside one large yellow star",
    "the white dog runs on dark grass",
    "people walk along the beach near a boat",
]
TINY_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    # At the usual 0.02 attention is so flat that a wrong scale or mask passes unnoticed.
    "initializer_range": 0.1,
}
