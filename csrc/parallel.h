// How kernels use threads: over output rows, never over a sum, so that results are the same bits for every
// number of threads. Without OpenMP the same source runs on one thread.
#ifndef ENT_PARALLEL_H
#define ENT_PARALLEL_H

extern int ent_num_threads;  // set from Python (kernels.set_num_threads); lives in the dispatcher

#ifdef _OPENMP
#include <omp.h>
#define ENT_PRAGMA(text) _Pragma(#text)
#define PARALLEL_FOR(condition) PARALLEL_FOR_ON(ent_num_threads, condition)
// Where each thread has its part of `scratch`, the caller says how many there are: another Python thread may set
// ent_num_threads at any time.
#define PARALLEL_FOR_ON(threads, condition) \
    ENT_PRAGMA(omp parallel for schedule(static) num_threads((int)(threads)) if(condition))
// Tasks of unequal length, taken as threads come free.
#define PARALLEL_TASKS_ON(threads, condition) \
    ENT_PRAGMA(omp parallel for schedule(dynamic) num_threads((int)(threads)) if(condition))
// Many loops for which threads are woken once, PARALLEL { for (..) SHARED_FOR for (..) .. }: none waits for the others
// between the loops.
#define PARALLEL(condition) ENT_PRAGMA(omp parallel num_threads(ent_num_threads) if(condition))
#define SHARED_FOR ENT_PRAGMA(omp for schedule(static) nowait)
static inline int ent_thread(void) { return omp_get_thread_num(); }
#else
#define PARALLEL_FOR(condition) (void)(condition);
#define PARALLEL_FOR_ON(threads, condition) (void)(threads), (void)(condition);
#define PARALLEL_TASKS_ON(threads, condition) (void)(threads), (void)(condition);
#define PARALLEL(condition) (void)(condition);
#define SHARED_FOR
static inline int ent_thread(void) { return 0; }
#endif

#endif
