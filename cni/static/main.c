/* A Python that carries its modules in its own file, as frozen byte code (build.py).
 *
 * It reads no environment, no site directory and no file at all, so that a container runtime's surroundings can't change it,
 * and it starts on a read-only root with a /tmp that executes nothing. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

static PyObject *set_namespace(PyObject *self, PyObject *args)
{
    int descriptor, kind = 0;

    (void)self;
    if (!PyArg_ParseTuple(args, "i|i", &descriptor, &kind))
        return NULL;
    if (setns(descriptor, kind) != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

/* Provisional in 3.11 (PEP 587, "Multi-Phase Initialization Private Provisional API"), and no header declares it; the file
 * is built with 3.11 alone. */
extern PyStatus _Py_InitializeMain(void);

/* Python's second half: codecs, sys.stdin and its like, signals. A third of its start, and nothing that hands a request to
 * the agent needs it. */
static PyObject *complete(PyObject *self, PyObject *none)
{
    PyStatus status = _Py_InitializeMain();

    (void)self;
    (void)none;
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
    Py_RETURN_NONE;
}

/* os.setns comes with Python 3.12; until then ctypes would be needed, which cannot be linked statically. */
static PyMethodDef methods[] = {
    {"setns", set_namespace, METH_VARARGS, "setns(fd, nstype=0): see setns(2)"},
    {"complete", complete, METH_NOARGS, "complete(): start the rest of Python; once"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_interceptor", NULL, -1, methods, NULL, NULL, NULL, NULL};

static PyObject *init_module(void)
{
    return PyModule_Create(&definition);
}

/* Memory for Python's objects by huge pages, where the kernel has them: one costs as much as a hundred small ones and holds
 * five times as much. */
#define HUGE_PAGE (2UL << 20)
static char *free_from, *free_to;

static void *take_arena(void *context, size_t size)
{
    char *taken;

    (void)context;
    if ((size_t)(free_to - free_from) < size) {
        size_t wanted = (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;

        taken = mmap(NULL, wanted + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (taken == MAP_FAILED)
            return NULL;
        free_from = (char *)(((uintptr_t)taken + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
        free_to = free_from + wanted;
        madvise(free_from, wanted, MADV_HUGEPAGE);
    }
    taken = free_from;
    free_from += size;
    return taken;
}

/* What is given back stays ours: this process lives for milliseconds. */
static void leave_arena(void *context, void *arena, size_t size)
{
    (void)context;
    (void)arena;
    (void)size;
}

/* Written by build.py. */
extern const struct _frozen modules[];

static const char RUN[] =
    "import posix, _interceptor\n"
    "posix.setns = _interceptor.setns\n" /* and so os.setns */
    "from cni.main import main\n"
    "status = main(_interceptor.complete)\n";

static int exit_status(void)
{
    PyObject *status = PyObject_GetAttrString(PyImport_AddModule("__main__"), "status");
    long value = status ? PyLong_AsLong(status) : -1;

    return value < 0 || value > 255 ? 1 : (int)value;
}

int main(int argc, char **argv)
{
    PyObjectArenaAllocator arenas = {NULL, take_arena, leave_arena};
    PyPreConfig before;
    PyConfig config;
    PyStatus status;
    wchar_t *self = L"/proc/self/exe";

    /* A runtime or an agent that is gone is an error to answer, not a reason to die. */
    signal(SIGPIPE, SIG_IGN);
    PyObject_SetArenaAllocator(&arenas);
    PyImport_AppendInittab("_interceptor", init_module);
    PyImport_FrozenModules = modules;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1; /* names of files, whatever the locale is and before there are codecs */
    status = Py_PreInitialize(&before);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
    PyConfig_InitIsolatedConfig(&config);
    config._init_main = 0; /* complete() */
    config.site_import = 0;
    config.write_bytecode = 0;
    config.install_signal_handlers = 0;
    config.pathconfig_warnings = 0;
    config.module_search_paths_set = 1; /* to none */
    status = PyConfig_SetString(&config, &config.program_name, self);
    if (!PyStatus_Exception(status)) /* else it looks around its own file for a library */
        status = PyConfig_SetString(&config, &config.home, self);
    if (!PyStatus_Exception(status))
        status = PyConfig_SetBytesArgv(&config, argc, argv);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
    PyGC_Disable(); /* it lives for some 30 ms */
    if (PyRun_SimpleString(RUN) != 0)
        return 1;
    /* Without Py_Finalize: everything is written, and taking the interpreter apart costs 3 ms. */
    _Exit(exit_status());
}
