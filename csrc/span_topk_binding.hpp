// span_topk in the module: checks what memory safety needs, releases Python's lock.
#pragma once

#include <nanobind/nanobind.h>

namespace el4ner {
void bind_span_topk(nanobind::module_ &module);
}
