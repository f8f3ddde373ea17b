class ModelRegistry:
    models = {}  # noqa: RUF012

    @classmethod
    def register_model(cls, arch, model_cls):
        cls.models[arch] = model_cls

    @classmethod
    def resolve_model_cls(cls, arch):
        return cls.models[arch], arch
