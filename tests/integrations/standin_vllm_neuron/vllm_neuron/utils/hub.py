"""Where huggingface_hub would be; tests put a hub of their own in its place."""


def list_repo_files(model_name):
    raise OSError(f"no hub here: {model_name}")


def hf_hub_download(model_name, file_name, cache_dir=None, local_files_only=False):
    raise OSError(f"no hub here: {model_name}/{file_name}")
