"""How much the package adds to encoding: COTSModel beside the bare towers it is built from, in one process.

    python benchmarks/encode.py                      # ViT-B/16 at 384 and BERT-base, a few minutes on a CPU
    python benchmarks/encode.py --layers 2 --rounds 5

Prints ratios of medians; the two sides take turns (A B A B ...) on the same inputs, threads and precision. On a CPU
the time is that of the process, so that other programs do not count; on a GPU it is that of the device.
"""

import argparse
import statistics
import time

import timm
import torch
from transformers import BertModel

from modeling_cots import COTSConfig, COTSModel


def measure(function, device: str) -> float:
    """Seconds of one call."""
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def ratio(ours, theirs, rounds: int, device: str) -> float:
    """Median time of `theirs` over that of `ours`: above 1 we are faster."""
    ours(), theirs()
    times = [(measure(ours, device), measure(theirs, device)) for _ in range(rounds)]
    return statistics.median(t for _, t in times) / statistics.median(o for o, _ in times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers of both towers")
    parser.add_argument("--image-batch", type=int, default=4)
    parser.add_argument("--text-batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    config = COTSConfig(
        text_config={"num_hidden_layers": args.layers}, vision_config={"num_hidden_layers": args.layers}
    )
    model = COTSModel(config).eval().to(args.device)
    vit = timm.create_model("vit_base_patch16_384", depth=args.layers, num_classes=0).eval().to(args.device)
    bert = BertModel(config.text_config, add_pooling_layer=False).eval().to(args.device)

    pixel_values = torch.randn(args.image_batch, 3, 384, 384, device=args.device)
    # 14 word pieces: the mean length of a caption of everyday photographs.
    input_ids = torch.randint(1000, 30_000, (args.text_batch, 14), device=args.device)
    padded_ids = torch.nn.functional.pad(input_ids, (0, 77 - 14))
    mask, padded_mask = torch.ones_like(input_ids), (padded_ids > 0).long()

    print(f"torch {torch.__version__}, timm {timm.__version__}, {args.device}, {torch.get_num_threads()} threads")
    rows = {
        "image encoding, ours / timm forward_features": (
            lambda: model.encode_image(pixel_values),
            lambda: vit.forward_features(pixel_values),
        ),
        "text encoding, ours / BertModel on the same tokens": (
            lambda: model.encode_text(input_ids, mask),
            lambda: bert(input_ids, attention_mask=mask),
        ),
        "text encoding, ours at 14 tokens / BertModel padded to 77": (
            lambda: model.encode_text(input_ids, mask),
            lambda: bert(padded_ids, attention_mask=padded_mask),
        ),
    }
    for title, (ours, theirs) in rows.items():
        print(f"{title:60s} {ratio(ours, theirs, args.rounds, args.device):5.2f} x as fast")


if __name__ == "__main__":
    main()
