// Memory between pages that cannot be accessed, for the tensors that a kernel gets.
#pragma once

#include <vector>

namespace guarded {

// Says which kernel runs from now on, for messages.
//   place: where it is launched.
//   names: its arguments as they are written there.
//   arguments: the arguments; null for those that are not pointers.
void begin_launch(const char* place, const char* names, const std::vector<const void*>& arguments);

// Ends the process if something was written beside a buffer.
void end_launch();

// Ends the process with a message.
[[noreturn]] void stop(const char* message);

}  // namespace guarded
