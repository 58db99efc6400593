// What the numbers of a row may be, by kind: a digit is the number of values of an enum or a flag, n is any
// integer that is not negative, d is a double.  The rest of a row is zero.
//
// Written by `python -m gradkern.codegen.records_header` from gradkern/codegen/records.py
// and limits.py; not to be edited.
#pragma once
#include "records.h"

namespace gradkern {

struct Fields {
  const char *kind, *letters;
};
constexpr Fields kFields[] = {
    {"Load", "n2nnnnnnnnnn"},
    {"Store", "n2nnnnnnnnnn"},
    {"Window", "n2nnnnnnnnnnnnnnnnnnnnn"},
    {"PooledWindow", "n2nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn2"},
    {"Stencil", "n2nnnnnnnnnnnnnnnnnn"},
    {"Pattern", "n2nnnnnnnnnnnnnnnnnnnnnnnnnnn2"},
    {"Elementwise", "n2nnnnnnnnnnnnnnnnnnnnddd"},
    {"Add", "n2nnnnnnnnnnnnnnnnnnn"},
    {"Move", "n2nnnnnnnnnnnnn"},
    {"Multiply", "n2nnnnnnnnnnnnnnnnnnnnn"},
    {"Lines", "n2nnnnnnnnnnnnnn33dnnnnnn"},
    {"MatMul", "n2nnnnnnnnnnnnnnnnnnnnnn"},
    {"Zero", "n2nnnnnnn"},
    {"Rectify", "n2nnnnnnn"},
    {"SeedRows", "n2nnnnnnn"},
    {"SeedOneHot", "n2nnnnnnnnn"},
    {"SeedDense", "n2nnnnnnnnnn"},
    {"WindowT", "n2nnnnnn2nnnnnnnnnnnnnnnnnnnnnnnnnn2nn2"},
    {"ScatterT", "n2nnnnnn2nnnnnnnnnnnnnnnnnnnnnnnnnn2n3nnnnnn"},
    {"DenseT", "n2nnnnnn2nnnnnnnnnnnnnnnnnnnnnnn22"},
    {"StencilT", "n2nnnnnnnnnnnnnnnnn"},
    {"PatternT", "n2nnnnnnnnnnnnnnnnnnnnnnnnnnn"},
    {"ElementwiseT", "n2nnnnnnnnnnnnnnnnnnn2"},
    {"Accumulate", "n2nnnnnnnnnnnnnn"},
    {"MoveT", "n2nnnnnnnnnnnnn2"},
    {"MultiplyT", "n2nnnnnnnnnnnnnnnnnnnnn"},
    {"LinesT", "n2nnnnnnnnnnnnnn33dnnnnnn"},
    {"MatMulT", "n2nnnnnnnnnnnnnnnnnnnnnn2"},
    {"StoreT", "n2nnnnnnnnnnnnn"},
};

}  // namespace gradkern
