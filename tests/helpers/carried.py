"""The code files that a saved model carries to the Hub."""

CARRIED = {
    "configuration_cots.py",
    "encoders_cots.py",
    "hub_export.py",
    "hub_push.py",
    "image_processing_cots.py",
    "image_reading_cots.py",
    "modeling_cots.py",
    "onnx_cots.py",
    "pipeline_cots.py",
    "processing_cots.py",
    "video_processing_cots.py",
    "video_reading_cots.py",
}
