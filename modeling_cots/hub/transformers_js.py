"""Both encoders in one ONNX graph, for the `zero-shot-image-classification` pipeline of transformers.js.

That pipeline runs one session, `onnx/model.onnx`, which takes texts and images and gives `logits_per_image`. Its Auto
classes take the encoders' own files. docs/onnx.md says what else transformers.js reads in a repository.
"""

from pathlib import Path

from ..onnx_cots import ONNX_FOLDER, model_file

OUTPUTS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")


def merge_encoders(folder: Path, dtype: str, temperature: float) -> None:
    """Write `model.onnx`, or its variant for `dtype`: both encoders, and their similarities over the temperature."""
    import onnx
    from onnx import TensorProto, compose, helper
    from onnxruntime.transformers.onnx_model import OnnxModel

    parts = {}
    for encoder in ("text", "vision"):
        part = OnnxModel(onnx.load(folder / model_file(encoder, dtype)))
        part.topological_sort()  # the float16 files are not sorted, and only sorted ones can be merged
        parts[encoder] = compose.add_prefix(part.model, f"{encoder}/", rename_inputs=False, rename_outputs=False)
    merged = compose.merge_models(parts["text"], parts["vision"], io_map=[])
    graph = merged.graph
    graph.initializer.append(helper.make_tensor("inverse_temperature", TensorProto.FLOAT, [], [1 / temperature]))
    graph.node.extend(
        [
            helper.make_node("Transpose", ["text_embeds"], ["text_embeds_t"], perm=[1, 0]),
            helper.make_node("MatMul", ["image_embeds", "text_embeds_t"], ["cosines"]),
            helper.make_node("Mul", ["cosines", "inverse_temperature"], ["logits_per_image"]),
            helper.make_node("Transpose", ["logits_per_image"], ["logits_per_text"], perm=[1, 0]),
        ]
    )
    outputs = {output.name: output for output in graph.output}
    for name, shape in (("logits_per_image", ["images", "texts"]), ("logits_per_text", ["texts", "images"])):
        outputs[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    del graph.output[:]
    graph.output.extend(outputs[name] for name in OUTPUTS)
    onnx.save(merged, folder / ONNX_FOLDER / Path(model_file("text", dtype)).name.removeprefix("text_"))
