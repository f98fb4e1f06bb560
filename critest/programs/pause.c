// What a pause image runs: it sleeps until it is told to end, and reaps the orphans that a shared pid namespace
// leaves to PID 1.
#include <errno.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void)
{
    sigset_t waited;
    int signal_number;

    sigemptyset(&waited);
    sigaddset(&waited, SIGCHLD);
    sigaddset(&waited, SIGINT);
    sigaddset(&waited, SIGTERM);
    // Blocked from here on, so that sigwait sees also what arrives before it is called.
    if (sigprocmask(SIG_BLOCK, &waited, NULL) != 0)
        return 1;
    for (;;) {
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        if (sigwait(&waited, &signal_number) != 0)
            return 1;
        if (signal_number != SIGCHLD)
            return 0;
    }
}
