// CUDA's header of this name, for the stand-in GPU.
#pragma once
#include "runtime.h"
