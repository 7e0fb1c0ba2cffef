// A few threads that sleep until there is work. The caller always works too, so every call makes progress whatever
// the workers do, and several threads may call at once.
#ifndef ADAFACTOR_POOL_H
#define ADAFACTOR_POOL_H

namespace adafactor {

// Runs work(context) on the calling thread and on up to `helpers` others at the same time; returns when all are done.
// `work` may run on fewer threads: it must take its share from a common list until that is empty.
void run_parallel(int helpers, void (*work)(void*), void* context);

}  // namespace adafactor
#endif
