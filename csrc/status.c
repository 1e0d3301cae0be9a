#include "pyreg.h"

const char *pyreg_strerror(enum pyreg_status status) {
    switch (status) {
    case PYREG_OK: return "success";
    case PYREG_NO_MEMORY: return "out of memory for scratch space";
    case PYREG_INTERRUPTED: return "interrupted";
    case PYREG_BAD_DTYPE: return "unknown dtype";
    case PYREG_BAD_GENERATOR: return "unknown mask generator";
    case PYREG_BAD_RATE: return "rate must be in [0, 1]";
    case PYREG_BAD_SHAPE: return "shape must have at most 64 dims of non-negative length and fewer than 2^63 elements";
    case PYREG_BAD_AXIS: return "axis must be one of the dims of the shape";
    case PYREG_BAD_ISA: return "PYREG_ISA names an instruction set that is unknown or that this machine lacks";
    }
    return "unknown status";
}
