"""Which parts of an image the words of a caption respond to (Figure 1 of the supplement of COTS).

    python examples/visualize_attention.py photo.jpg "a girl in a red hat" --words girl hat

Writes one figure: the image, a heat map for the whole caption and for each word, and a bar for every word of the
caption. Without --words the six words with the highest relevance for the image get heat maps. docs/seeing.md explains
the maps, and benchmarks/pointing_game.py measures how well they point at objects.
"""

from transformers import AutoProcessor

from modeling_cots import COTSModel
from modeling_cots.data.revisions import check_revision
from modeling_cots.image_reading_cots import read_image
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.scripts.plain_parser import PlainParser
from modeling_cots.visualization.heat_maps import draw_word_maps
from modeling_cots.visualization.relevance import explain_pair


def main() -> None:
    parser = PlainParser(__doc__)
    parser.add_argument("image", help="an image file")
    parser.add_argument("caption", help="the caption to compare it with")
    parser.add_argument("--words", nargs="+", help='words of the caption; quote phrases: --words girl "red hat"')
    parser.add_argument("--model", default="runs/quickstart", help="a COTS checkpoint (folder or Hub id)")
    parser.add_argument("--revision", "--model_revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--output", default="attention.png", help="the figure to write")
    args = parser.parse_args()
    check_revision("model", args.model, args.revision)
    version = {"revision": args.revision or "main"}

    # 1. The pair and the model. The maps need attention weights, which only eager attention computes.
    image = read_image(args.image)
    model = COTSModel.from_pretrained(args.model, attn_implementation="eager", **version).eval()
    processor = AutoProcessor.from_pretrained(args.model, **version)

    # 2. The maps.
    relevance = explain_pair(model, processor, image, args.caption, args.words)

    # 3. The figure.
    draw_word_maps(image, args.caption, relevance).savefig(args.output, dpi=100)
    print(f"Cosine similarity of image and caption: {relevance.score:.3f}. What each word adds to it:")
    for word, score in zip(relevance.words, relevance.word_scores.tolist(), strict=True):
        print(f"  {word.text:20s} {round(score, 3) + 0.0:+.3f}")
    print(f"The maps are in {args.output}.")


if __name__ == "__main__":
    run_script(main)
