"""Low-bit weights: codebooks and affine codes on groups, packed storage, and their error.

The package works on plain tensors. It knows nothing of models, adapters or training.
"""

from peft_vit.core.quantization.formats import QuantizationFormat, code_values
from peft_vit.core.quantization.packing import pack_codes, unpack_codes
from peft_vit.core.quantization.quantizer import quantize, quantize_with_compensation
from peft_vit.core.quantization.tensor import QuantizedTensor, relative_error
