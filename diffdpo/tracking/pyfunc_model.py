"""What MLflow keeps of a trained model: with this file it loads as ``mlflow.pyfunc`` and answers prompts.

MLflow copies the file beside the weights and runs it where the model is loaded; diffdpo must be installed there.
"""

from typing import Any

import mlflow.models
import pandas as pd
from mlflow.pyfunc.model import PythonModel

from diffdpo.models.load import load_model
from diffdpo.sampling.decode import sample
from diffdpo.sampling.prompt import encode_prompt


class Answers(PythonModel):
    """``predict(prompts)``: a sampled answer for each, in order. The parameters are those of the signature."""

    def load_context(self, context: Any) -> None:
        """The model, or the adapter with its base."""
        self.loaded = load_model(context.artifacts["model"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """``model_input``: a table whose first column holds the prompts; MLflow makes it of a list."""
        prompts = model_input.iloc[:, 0]
        options = {key: value for key, value in (params or {}).items() if key != "seed"}
        block = max(1, int(options.get("block_length", 1)))
        length = -(-int(options.get("gen_length", 64)) // block) * block  # whole blocks, as the commands have them
        options |= {"gen_length": length, "steps": length}
        encoded = [encode_prompt(str(prompt), self.loaded, "auto") for prompt in prompts]
        seed = int((params or {}).get("seed", 0))
        answers = sample(self.loaded.model, self.loaded.spec, encoded, seed=seed, batch_size=8, **options)
        return [str(self.loaded.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]


mlflow.models.set_model(Answers())
