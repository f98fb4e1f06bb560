// Installed setuid root in an image and run as another user: with no_new_privs the kernel ignores the bit, and the
// number printed is the caller's instead of 0.
#include <stdio.h>
#include <unistd.h>

int main(void)
{
    return printf("Effective uid: %d\n", (int)geteuid()) < 0;
}
